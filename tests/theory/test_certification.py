"""The claims that certificates rest on, and their controls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from theory import certification

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
    samples = [(control.sample or claim.sample)(seed, torch.float64, device) for seed in range(12)]
    found = [control.check(sample) for sample in samples]
    assert any(e.hypotheses_met and not e.holds for e in found)
    # the same samples agree with the claim itself
    kept = [claim.check(sample) for sample in samples]
    assert all(e.holds or not e.hypotheses_met for e in kept)
