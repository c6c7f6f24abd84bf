"""The claims about integrators at drawn sizes, ranks, conditioning and seeds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lrmanifold as lrm
from theory import integrators
from theory.integrators import (
    descent,
    exactness,
    order,
    retractions,
    schemes,
    small_singular_values,
)
from theory.integrators.schemes import SCHEMES, dense, dlra, from_dense, integrate, orth
from theory.runner import Settings, verify_control

F64 = torch.float64
DTYPES = (F64, torch.float32)
seeds = st.integers(0, 2**31 - 1)
A_FEW = settings(max_examples=max(2, settings().max_examples // 12))


@st.composite
def sizes(draw) -> dict[str, int]:
    m, n = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    return {"m": m, "n": n, "r": draw(st.integers(1, min(m, n)))}


@A_FEW
@given(seed=seeds, r=st.integers(1, 4))
def test_every_integrator_has_its_order(device, seed, r):
    evidence = order.check(order.sample(seed, F64, device, r=r))
    assert evidence.holds, evidence


@A_FEW
@given(seed=seeds, r=st.integers(2, 5))
def test_robust_integrators_do_not_notice_small_singular_values(device, seed, r):
    evidence = small_singular_values.check(small_singular_values.sample(seed, F64, device, r=r))
    assert evidence.holds, evidence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(size=sizes(), seed=seeds, cond=st.floats(1, 100))
def test_exactness_on_paths_of_rank_r(device, dtype, size, seed, cond):
    evidence = exactness.check(exactness.sample(seed, dtype, device, **size, cond=cond))
    smallest = evidence.detail["smallest overlap"]
    assert evidence.holds or smallest < 1e-2, evidence


def test_exactness_of_strang_splitting_needs_the_bases_at_half_a_step(device):
    """V(t_½) is orthogonal to V(t₀), and both ends overlap: the other schemes are exact."""
    blocks = {"U0": (1, 0, 0), "U1": (0.1, 0.3, 0), "V0": (1, 0, 0), "V1": (-2, 1, 0)}
    sample = {k: torch.tensor(v, dtype=F64, device=device)[:, None] for k, v in blocks.items()}
    sample |= {"S0": torch.ones(1, 1).to(sample["U0"]), "S1": torch.zeros(1, 1).to(sample["U0"])}
    assert not exactness.check(sample).hypotheses_met
    others = tuple(name for name in exactness.EXACT if name != "Strang-KSL")
    assert exactness.check(sample, exact=others).holds
    assert exactness.check(sample, exact=others).hypotheses_met


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(size=sizes(), seed=seeds, cond=st.floats(1, 10))
def test_augmented_bug_never_raises_the_loss(device, dtype, size, seed, cond):
    evidence = descent.check(descent.sample(seed, dtype, device, **size, cond=cond))
    assert evidence.holds, evidence


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_a_step_that_loses_less_than_it_should_is_noticed(device, monkeypatch, dtype, share):
    def shorter(F, t, h, Y, substeps):
        whole = schemes.augmented(F, t, h, Y, substeps)
        return schemes._galerkin(F, t, share * h, Y, whole.U, whole.V, substeps)

    monkeypatch.setitem(descent.STEPS, "augmented BUG", shorter)
    samples = [descent.sample(seed, dtype, device) for seed in range(6)]
    assert not any(descent.check(sample).holds for sample in samples)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(size=sizes(), seed=seeds, cond=st.floats(1, 1e3), t=st.floats(1e-4, 2))
def test_a_retraction_is_one_step_of_its_integrator(device, dtype, size, seed, cond, t):
    evidence = retractions.check(retractions.sample(seed, dtype, device, **size, cond=cond, t=t))
    assert evidence.holds, evidence


def test_every_low_rank_retraction_with_an_integrator_is_compared():
    """orthographic and factored are no integrators of the list."""
    assert set(lrm.retractions.available()) - set(retractions.PAIRS) == {"orthographic", "factored"}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_zero_force_moves_nothing(device, name):
    start = order.sample(0, F64, device)["start"]
    Y = SCHEMES[name](lambda t, Z: torch.zeros_like(Z), 0.0, 0.5, start)
    assert torch.allclose(dense(Y), dense(start), atol=1e-13)


@pytest.mark.parametrize("name", SCHEMES)
def test_frames_stay_orthonormal(device, name):
    sample = order.sample(1, F64, device)
    for Q in integrate(SCHEMES[name], sample["force"], sample["start"], 8)[::2]:
        eye = torch.eye(Q.shape[-1], dtype=F64, device=device)
        assert float((Q.mT @ Q - eye).abs().max()) < 1e-12


def test_reference_flow_is_of_order_four(device):
    sample = order.sample(2, F64, device)
    ends = [dlra(sample["force"], sample["start"], n) for n in (8, 16, 32)]
    first, second = (float((a - b).norm()) for a, b in pairwise(ends))
    assert first / second == pytest.approx(16.0, rel=0.3)


def test_from_dense_and_orth(device):
    A = torch.randn(2, 6, 5, dtype=F64, device=device)
    assert torch.allclose(dense(from_dense(A, 5)), A)
    zero = orth(torch.zeros(2, 6, 3, dtype=F64, device=device))
    assert torch.allclose(zero.mT @ zero, torch.eye(3, dtype=F64, device=device))


@pytest.mark.parametrize(
    ("claim", "control"),
    [(c, k) for c in integrators.CLAIMS for k in c.controls],
    ids=lambda x: getattr(x, "id", None) or x.name,
)
def test_control_is_rejected(device, claim, control):
    found = verify_control(claim, control, Settings(trials=1, device=device))
    assert found.passed, found
