"""The claims that certificates rest on, and their controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrmanifold.certify import bounds
from lrmanifold.nn import LowRankConv2d
from theory import certification
from theory.certification import _certified, certificates, convex_potential, grid
from theory.sampling import Entry, taped

seeds = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("claim", certification.CLAIMS, ids=lambda c: c.id)
@given(seed=seeds)
def test_claim_holds(device, dtype, claim, seed):
    evidence = claim.check(claim.sample(seed, dtype, device))
    assert evidence.holds or not evidence.hypotheses_met, evidence


CONTROLS = [(c, k) for c in certification.CLAIMS for k in c.controls]


@pytest.mark.parametrize(("claim", "control"), CONTROLS, ids=lambda v: getattr(v, "name", ""))
def test_every_wrong_version_is_rejected(device, claim, control):
    samples = [(control.sample or claim.sample)(seed, torch.float64, device) for seed in range(6)]
    found = [control.check(sample) for sample in samples]
    assert any(e.hypotheses_met and not e.holds for e in found)
    # the same samples agree with the claim itself
    kept = [claim.check(sample) for sample in samples]
    assert all(e.holds or not e.hypotheses_met for e in kept)


@pytest.mark.parametrize("seed", range(4))
def test_a_convolution_whose_norm_is_understated_is_noticed(device, monkeypatch, seed):
    """One per cent, at each stride and number of groups of the extremal example."""
    sample = _certified.constant_image(seed, torch.float64, device)
    assert certificates.check(sample).holds
    right = bounds._REGISTRY[LowRankConv2d]

    def short(module, context):
        bound = right(module, context)
        return replace(bound, norm=0.99 * bound.norm)

    monkeypatch.setitem(bounds._REGISTRY, LowRankConv2d, short)
    assert not certificates.check(sample).holds


@pytest.mark.parametrize("d", [1, 2, 3])
@given(seed=seeds)
def test_the_grid_is_sampled_in_every_dimension_and_attained_there(device, d, seed):
    sample = grid.sample(3 * (seed // 3) + d - 1, torch.float64, device)
    assert sample["kernel"].ndim == d + 2
    assert len(sample["N"]) == d
    assert grid.check(sample).holds
    attained = grid.check(grid.between(seed, torch.float64, device, d=d))
    assert attained.holds
    assert attained.ratio > 1.0 - 1e-12
    # The factor of each dimension is needed.
    assert not grid.check(grid.between(seed, torch.float64, device, d=d), dimensions=d - 1).holds


@given(seed=seeds)
def test_search_moves_the_slopes_of_a_convex_potential(device, seed):
    with taped() as tape:
        before = convex_potential.sample(seed, torch.float64, device)["slopes"]
    moved = [Entry(e.kind, 0.5 * e.value if e.value.ndim == 1 else e.value) for e in tape.entries]
    with taped(moved):
        after = convex_potential.sample(seed, torch.float64, device)["slopes"]
    if not bool((before == before.round()).all()):  # half of the samples have slopes 0 and 1 only
        torch.testing.assert_close(after, 0.5 * before)
