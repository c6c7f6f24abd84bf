"""The theorems about what is really trained, at drawn seeds, and their extremal examples."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from theory import training
from theory.runner import Settings, verify_control
from theory.training import (
    catching_up,
    constrained_steps,
    discrete,
    momentum,
    momentum_one_sided,
    noise,
    outputs,
    product,
    projected_step,
    transport,
)

F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)
FEW = settings(max_examples=max(2, settings().max_examples // 8))
QUICK = [product, projected_step, outputs]
TRAINED = [discrete, momentum, momentum_one_sided, constrained_steps]


@pytest.mark.parametrize("module", QUICK, ids=lambda m: m.__name__.split(".")[-1])
@given(seed=seeds)
def test_claim_holds(module, device, seed):
    evidence = module.check(module.sample(seed, F64, device))
    assert evidence.holds or not evidence.hypotheses_met, evidence


@pytest.mark.parametrize("module", TRAINED, ids=lambda m: m.__name__.split(".")[-1])
@FEW
@given(seed=seeds)
def test_training_stays_inside_its_bound(module, device, seed):
    assert module.check(module.sample(seed, F64, device)).holds


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@FEW
@given(seed=st.integers(0, 10**6))
def test_momentum_is_transported_for_every_retraction(device, dtype, seed):
    assert transport.check(transport.sample(seed, dtype, device)).holds


@pytest.mark.parametrize(
    ("module", "extremal"),
    [
        (discrete, discrete.resting),
        (momentum, momentum.resting),
        (momentum, momentum.turned),
        (momentum_one_sided, momentum_one_sided.turned),
        (momentum_one_sided, momentum_one_sided.returning),
        (product, product.one_layer),
        (projected_step, projected_step.attained),
        *((constrained_steps, extremal.sample) for extremal in constrained_steps.CLAIM.extremal),
        (outputs, outputs.aligned),
        (outputs, outputs.flipped),
    ],
    ids=lambda x: getattr(x, "__name__", "").split(".")[-1],
)
def test_sharp_constants_are_attained(device, module, extremal):
    for seed in range(3):
        evidence = module.check(extremal(seed, F64, device))
        assert evidence.holds
        assert evidence.ratio > 0.99


@pytest.mark.parametrize(
    ("term", "example"),
    [
        ("gradient", constrained_steps.resting),
        ("curvature", constrained_steps.turning),
        ("companion", partial(constrained_steps.shrinking, twin=True)),
        ("step", partial(constrained_steps.shrinking, twin=False)),
    ],
)
def test_no_term_of_the_certificate_can_be_left_out(device, term, example):
    assert not constrained_steps.check(example(0, F64, device), without=(term,)).holds


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [0.999, 1.001])
def test_a_transported_momentum_of_another_length_is_noticed(device, dtype, factor):
    def other(*args):
        return factor * transport.transported(*args)

    samples = [transport.sample(seed, dtype, device) for seed in range(6)]
    assert not any(transport.check(sample, transport=other).holds for sample in samples)


def test_copied_momentum_is_far_outside_of_the_bound_on_every_sample(device):
    control = next(c for c in momentum.CLAIM.controls if "copied" in c.name)
    assert control.sample is not None
    assert all(control.check(control.sample(s, F64, device)).ratio > 10.0 for s in range(6))


def test_clipping_now_and_then_costs_the_set_or_the_rate(device):
    given_ = catching_up.sample(0, F64, device)
    second, root = (
        catching_up.check(given_, step=lambda *a, n=n: catching_up.sometimes(*a, every=n))
        for n in (catching_up.second, catching_up.root)
    )
    assert second.detail["slope"] == pytest.approx(1.0, abs=0.05)
    assert second.detail["cond / κ, largest"] > 1.01
    assert root.detail["slope"] < 0.6


@pytest.mark.parametrize(("retraction", "order"), [("factored", 1), ("svd", 2)])
def test_steps_leave_a_path_in_the_manifold_without_noise_and_gap(device, retraction, order):
    """Why T5 has h²: ε = σ = 0, and yet the distance is not 0."""
    given_ = noise.sample(0, F64, device)
    far, near = (noise.path_in_the_manifold(given_, n, retraction)[0] for n in (16, 32))
    assert far / near == pytest.approx(2.0**order, rel=0.1)


def test_the_one_sided_form_of_T6_stays_small_where_the_field_contracts(device):
    """λ = -1, ℓ = 1: the form with ℓ grows exponentially, this one does not."""
    options = {"family": "attraction", "h": 0.05, "steps": 60, "retraction": "svd"}
    given_ = momentum_one_sided.sample(3, F64, device, **options)
    at, beta = given_["training"], given_["beta"]
    old, rows = momentum.run(at, beta), momentum_one_sided.run(at, beta)
    E, V = old[0]["e"], old[0]["v"]
    for q in old:
        V = beta * V + (beta * q["memory"] + q["force"] + q["lipschitz"]) * E + q["source"]
        V = V + beta * q["lost"]
        E = E + at.h * (V + q["rho"] + q["d"])
    new = momentum_one_sided.bounds(at, beta, rows)[-1]
    assert bool((rows[-1]["next e"] <= new).all())
    assert bool((new < 0.1 * E).all())


def test_the_bootstrap_interval_holds_a_known_slope():
    torch.manual_seed(0)
    h = torch.tensor([1.0 / n for n in noise.LADDER], dtype=F64)
    squares = h[:, None] * torch.randn(len(h), noise.SEEDS, dtype=F64).square()
    low, high = noise.interval(squares, 0)
    assert low < 1.0 < high
    assert high - low < 0.5


@pytest.mark.parametrize(
    ("claim", "control"),
    [
        (c, k)
        for c in training.CLAIMS
        for k in c.controls
        if c.id.split("/")[1] not in ("catching-up", "noise", "discrete-a-priori")
    ],
    ids=lambda x: getattr(x, "id", None) or x.name,
)
def test_control_is_rejected(device, claim, control):
    assert verify_control(claim, control, Settings(trials=4, device=device)).passed


@pytest.mark.slow
@pytest.mark.parametrize("claim", training.CLAIMS, ids=lambda c: c.id)
def test_every_control_is_rejected(device, claim):
    for control in claim.controls:
        assert verify_control(claim, control, Settings(device=device)).passed
