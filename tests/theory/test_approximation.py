"""The approximation theorems at drawn families, sizes, ranks and conditioning."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import approximation
from theory.approximation import (
    a_priori,
    any_neighbour,
    certificate,
    constrained,
    constrained_defect,
    constrained_linear,
    exponent,
    isometries,
    koch_lubich,
    lipschitz,
    no_blow_up,
    prescribed_path,
    proportional,
    strongly_convex,
    unknown_gap,
)
from theory.approximation.constrained_flow import cone, project, reach_constant
from theory.approximation.extremal import (
    constant_defect,
    sharp_exponent,
    sharp_lipschitz,
    sharp_reach,
    sharp_stretch,
)
from theory.approximation.flows import cumulative, integrate, measure
from theory.approximation.problems import FAMILIES, Batch, problem
from theory.runner import Settings, verify_control

F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)
# A share of the examples of the profile: one of them is 8 problems, up to seconds long.
A_FEW = settings(max_examples=max(2, settings().max_examples // 8))
ONE = settings(max_examples=max(2, settings().max_examples // 12))


@st.composite
def problems(draw) -> dict:
    m, n = draw(st.integers(3, 9)), draw(st.integers(3, 9))
    return {
        "m": m,
        "n": n,
        "rank": draw(st.integers(1, min(m, n) - 1)),
        "spread": draw(st.floats(1.0, 6.0)),
        "change": draw(st.floats(0.05, 1.0)),
        "noise": 10 ** draw(st.floats(-4, -1)),
        "lowest_curvature": draw(st.sampled_from((0.5, 0.0, -0.5))),
    }


def agrees(evidence) -> bool:
    """The check accepts the sample, or it is outside of the hypotheses."""
    return evidence.holds or not evidence.hypotheses_met


# -- theorem A


@pytest.mark.parametrize("family", FAMILIES)
@ONE
@given(size=problems(), seed=seeds)
def test_low_rank_flow_stays_inside_its_certificate(device, family, size, seed):
    evidence = certificate.check(certificate.sample(seed, F64, device, families=(family,), **size))
    assert agrees(evidence), evidence


@pytest.mark.parametrize(
    "module",
    [a_priori, lipschitz, any_neighbour, unknown_gap, koch_lubich],
    ids=lambda m: m.__name__.split(".")[-1],
)
@A_FEW
@given(size=problems(), seed=seeds)
def test_a_priori_bounds_hold(device, module, size, seed):
    evidence = module.check(module.sample(seed, F64, device, **size))
    assert agrees(evidence), evidence


@A_FEW
@given(size=problems(), seed=seeds)
def test_prescribed_path_bound_holds(device, size, seed):
    assert agrees(prescribed_path.check(prescribed_path.sample(seed, F64, device, **size)))


@A_FEW
@given(seed=seeds, change=st.floats(0.0, 0.3), noise=st.floats(1e-3, 0.05))
def test_strongly_convex_bound_is_uniform_in_time(device, seed, change, noise):
    sample = strongly_convex.sample(seed, F64, device, change=change, noise=noise)
    assert agrees(strongly_convex.check(sample))


@pytest.mark.parametrize("family", [no_blow_up.TURNS, "quadratic", "completion", "prescribed path"])
@ONE
@given(seed=seeds, noise=st.floats(-6, -2))
def test_small_epsilon_needs_no_exponential_factor(device, family, seed, noise):
    sample = no_blow_up.sample(seed, F64, device, family=family, noise=10**noise)
    assert agrees(no_blow_up.check(sample))


def test_theorem_E_beats_theorem_A_by_an_exponential_factor(device):
    at = no_blow_up.turning(3, device, noise=1e-4, horizon=8.0)
    evidence = no_blow_up.check({"problem": at})
    assert evidence.holds
    assert evidence.detail["theorem A / theorem E at T, mean"] > 100.0


def test_riccati_solution_is_right_where_it_is_known(device):
    """g' = 1 + g² has the solution tan t."""
    t = torch.linspace(0.0, 1.2, 65, dtype=F64, device=device)
    one = torch.ones(65, 1, dtype=F64, device=device)
    assert torch.allclose(no_blow_up.riccati(t, 0.0 * one, one, one)[:, 0], t.tan(), rtol=1e-6)


@ONE
@given(seed=seeds)
def test_error_is_proportional_to_epsilon(device, seed):
    assert proportional.check(proportional.sample(seed, F64, device)).holds


@pytest.mark.parametrize(
    "extremal", [sharp_exponent, sharp_lipschitz, constant_defect], ids=lambda f: f.__name__
)
def test_each_constant_of_the_certificate_is_attained(device, extremal):
    evidence = certificate.check(extremal(0, F64, device))
    assert evidence.holds
    assert evidence.ratio > 0.999


@pytest.mark.parametrize("theta", [1e-2, 1e-3])
def test_exponent_is_attained_at_the_rate_theta_squared(device, theta):
    assert exponent.check(exponent.sample(1, F64, device, theta=theta)).holds


def test_a_path_far_from_low_rank_is_outside_of_the_hypotheses(device):
    sample = certificate.sample(3, F64, device, families=("prescribed path",), noise=5.0)
    assert not certificate.check(sample).hypotheses_met


def test_independent_problems_are_counted_not_times(device):
    sample = certificate.sample(1, F64, device, noise=0.01)
    evidence = certificate.check(sample)
    assert evidence.independent == sample["problem"].batch
    assert len(evidence.ratios) > 20 * evidence.independent


def test_the_first_tenth_of_the_time_is_left_out_of_the_ratios(device):
    detail = certificate.check(certificate.sample(0, F64, device)).detail
    assert detail["‖Y-W‖ / (ε + E), all times"][2] == pytest.approx(1.0)
    assert detail["‖Y-W‖ / (ε + E), after 10 %"][2] < 1.0


# -- the tools


def test_flows_are_integrated_with_order_four(device):
    at = problem(0, device, families=("completion",), m=6, n=5, rank=2)
    ends = [integrate(at, steps) for steps in (8, 16, 32)]
    W, Y = (
        [path[-1] for path in paths]
        for paths in zip(*((p.W[0], p.Y[0]) for p in ends), strict=True)
    )
    for fine in (W, Y):
        first, second = (float((a - b).norm()) for a, b in pairwise(fine))
        assert first / second == pytest.approx(16.0, rel=0.35)


def test_cumulative_integral_is_of_order_four(device):
    errors = []
    for n in (32, 64):
        t = torch.linspace(0.0, 2.0, n + 1, dtype=F64, device=device)
        errors.append(float((cumulative(t, t.cos()[:, None])[:, 0] - t.sin()).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(16.0, rel=0.2)


@pytest.mark.parametrize("name", FAMILIES)
def test_lipschitz_constants_of_the_families_are_right(device, name):
    at = problem(2, device, families=(name,), restoring=0.7)
    if at.lipschitz is None:
        pytest.skip("the net has no global constants")
    random, t = Batch(0, device), torch.zeros((), dtype=F64, device=device)
    m, n = at.start[0].shape[-2:]
    for _ in range(20):
        A, B = random.normals(m, n), random.normals(m, n)
        (FA,), (FB,) = at.force(t, (A,)), at.force(t, (B,))
        D = A - B
        assert bool(((FA - FB).norm(dim=(1, 2)) <= at.lipschitz * D.norm(dim=(1, 2)) + 1e-12).all())
        quotient = ((FA - FB) * D).sum((1, 2)) / D.square().sum((1, 2))
        assert bool((quotient <= at.one_sided + 1e-12).all())


def test_velocity_of_a_prescribed_path_is_its_derivative(device):
    """A flow that is drawn to a path and starts on it stays on it: the velocity is right."""
    plain, drawn = (
        problem(4, device, families=("prescribed path",), restoring=rho) for rho in (0.0, 1.0)
    )
    a, b = (measure(at, integrate(at, 64)) for at in (plain, drawn))
    assert torch.allclose(a["eps"], b["eps"], atol=1e-7)


# -- the constrained set


@pytest.mark.parametrize(
    ("module", "tau"),
    [(constrained, 0.0), (constrained, 0.1), (constrained_defect, 1.0)]
    + [
        pytest.param(module, tau, marks=pytest.mark.slow)
        for module, tau in (
            (constrained, 1.0),
            (constrained_defect, 0.0),
            (constrained_defect, 0.1),
        )
    ],
    ids=lambda x: getattr(x, "__name__", str(x)).rpartition(".approximation.")[2],
)
@ONE
@given(seed=st.integers(0, 10**6))
def test_constrained_flow_is_certified(device, module, tau, seed):
    assert agrees(module.check(module.sample(seed, F64, device, tau=tau)))


@A_FEW
@given(seed=seeds)
def test_theorem_A_holds_on_the_isometries(device, seed):
    assert agrees(isometries.check(isometries.sample(seed, F64, device)))


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.08, 0.04])
def test_error_is_linear_in_epsilon_with_an_active_constraint(device, eps):
    found = [
        constrained_linear.check(constrained_linear.sample(3, F64, device, eps=e, attraction=0.0))
        for e in (eps, eps / 2)
    ]
    assert all(e.holds for e in found)
    a, b = (e.detail["bound / ε, largest"] for e in found)
    assert a / b == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(
    ("constant", "extremal"),
    [
        ("curvature", constrained_linear.sharp_bend),
        ("push", constrained_linear.sharp_bend),
        ("force", constrained_linear.sharp_force),
        ("stretch", sharp_stretch),
        ("defect", constrained_linear.sharp_defect),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_each_constant_of_theorem_D_is_attained(device, constant, extremal):
    given_ = extremal(1, F64, device)
    evidence = constrained_linear.check(given_)
    assert evidence.holds
    assert evidence.ratio > 0.999
    assert not constrained_linear.check(given_, **{constant: 0.95}).holds


def test_a_forgotten_start_leaves_the_source_of_A4(device):
    given_ = any_neighbour.drawn_to_a_path(0, F64, device)
    assert any_neighbour.check(given_).ratio > 0.99
    assert not any_neighbour.check(given_, defect=0.95).holds


@pytest.mark.parametrize("tau", [0.0, 0.2, 1.0])
def test_reach_constant_is_attained_by_a_flow(device, tau):
    evidence = constrained_defect.check(sharp_reach(2, F64, device, tau=tau))
    assert evidence.holds
    assert evidence.ratio > 0.995


@given(r=st.integers(1, 50), tau=st.floats(0, 100))
def test_reach_constant_lies_between_one_half_and_one_over_root_two(r, tau):
    assert 0.5 <= reach_constant(r, tau) <= 1 / math.sqrt(2)


@given(seed=seeds, tau=st.sampled_from((0.0, 0.1, 1.0)), r=st.integers(1, 4))
def test_cone_projection_is_one(device, seed, tau, r):
    """g = P_T Z of a cone: ⟨Z - g, g⟩ = 0, g is nearer to Z than 0 is, and P_T g = g."""
    random = Batch(seed, device, 3)
    # Half of the starts are on the boundary, half are where the projection finds them.
    Y = project(random.low_rank(7, 6, random.values(r, 1.0 + 2.0 * (seed % 2))), r, tau)
    Z = random.units(7, 6)
    g = cone(Y, Z, r, tau)
    assert float(((Z - g) * g).sum((1, 2)).abs().max()) < 1e-4
    assert bool((g.norm(dim=(1, 2)) <= Z.norm(dim=(1, 2)) + 1e-5).all())
    assert torch.allclose(cone(Y, g, r, tau), g, atol=1e-4)


# -- controls


@pytest.mark.parametrize(
    ("claim", "control"),
    [(c, k) for c in approximation.CLAIMS for k in c.controls],
    ids=lambda x: getattr(x, "id", None) or x.name,
)
def test_control_is_rejected(device, claim, control):
    found = verify_control(claim, control, Settings(trials=1, device=device))
    assert found.passed, found
