"""The claims about condition numbers at drawn sizes, spectra, bounds and seeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lrmanifold as lrm
from theory import conditioning
from theory.conditioning import (
    enclosed,
    exact_projection,
    k_tau_projection,
    k_tau_prox,
    mean_clamp,
    penalty_converse,
    penalty_exponential,
    penalty_scale_free,
    penalty_weakly_convex,
    stability,
    stability_linear,
    tau_zero,
)
from theory.runner import Settings, verify_control

DTYPES = (torch.float64, torch.float32)
seeds = st.integers(0, 2**31 - 1)
taus = st.one_of(st.sampled_from((0.0, 1e-3, 0.1, 1.0, 10.0)), st.floats(0.0, 20.0))

FLOWS = ("stability", "stability-linear")
OF_MATRICES = ("k-tau-projection", "k-tau-prox")
ENCLOSED = ("enclosed",)
OF_CORES = [
    c for c in conditioning.CLAIMS if c.id.split("/")[1] not in FLOWS + OF_MATRICES + ENCLOSED
]


def agrees(evidence) -> bool:
    return evidence.holds or not evidence.hypotheses_met


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("claim", OF_CORES, ids=lambda c: c.id)
@given(r=st.integers(2, 8), log_cond=st.floats(0, 3), tau=taus, seed=seeds)
def test_claim_holds(claim, dtype, device, r, log_cond, tau, seed):
    sample = claim.sample(seed, dtype, device, r=r, cond=10.0**log_cond, tau=tau)
    evidence = claim.check(sample)
    assert agrees(evidence), evidence


def errors_at_tau_zero(S) -> tuple[float, float]:
    """‖S - mean Q‖² and ‖S - rms Q‖²."""
    s, Q = torch.linalg.svdvals(S), lrm.linalg.polar(S)
    return tuple(float((S - a * Q).square().sum()) for a in (s.mean(), s.square().mean().sqrt()))


@given(r=st.integers(2, 8), log_cond=st.floats(0.1, 3), seed=seeds)
def test_the_quotient_at_tau_zero_lies_inside_its_open_interval(device, r, log_cond, seed):
    S = tau_zero.sample(seed, torch.float64, device, r=r, cond=10.0**log_cond)["S"]
    nearest, rms = errors_at_tau_zero(S)
    if nearest > 1e-6 * float(S.square().sum()):
        assert 1.0 < rms / nearest < tau_zero.largest_quotient(r)


@given(r=st.integers(1, 8), seed=seeds)
def test_multiples_of_orthogonal_matrices_have_no_quotient_at_tau_zero(device, r, seed):
    sample = dict(tau_zero.sample(seed, torch.float64, device, r=r, cond=1.0))
    sample["S"] = 2.0 * torch.linalg.qr(sample["S"]).Q
    assert max(errors_at_tau_zero(sample["S"])) < 1e-25
    assert tau_zero.check(sample).holds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", [k_tau_projection, k_tau_prox])
@given(m=st.integers(2, 8), n=st.integers(2, 8), share=st.floats(0, 1), tau=taus, seed=seeds)
def test_claim_about_k_tau_holds(module, dtype, device, m, n, share, tau, seed):
    r = 1 + int(share * (min(m, n) - 2))
    evidence = module.check(module.sample(seed, dtype, device, m=m, n=n, r=r, tau=tau))
    assert agrees(evidence), evidence


@pytest.mark.parametrize("k", [0, 1, 120, 239])
def test_closed_forms_are_enclosed_on_whole_boxes(k, device):
    pytest.importorskip("mpmath")
    evidence = enclosed.check(enclosed.sample(k, torch.float64, device))
    assert evidence.holds, evidence


boxes = st.integers(0, enclosed.CELLS - 1)
#: Farther from 1 than the allowance: in q it changes 4c² = 1 + q by a third of itself at least.
wrong_factors = st.one_of(st.floats(0.1, 0.8), st.floats(1.2, 3.0))


@given(k=boxes, factor=wrong_factors)
def test_no_box_holds_for_another_prox_constant(k, factor):
    """Too small, and the inequality fails; too large, and it is not attained."""
    pytest.importorskip("mpmath")
    share = enclosed.share_of_normal
    evidence = enclosed.check({"k": k}, share=lambda kappa, r: factor * share(kappa, r))
    assert not evidence.holds, evidence.detail


@given(k=boxes, factor=st.one_of(st.floats(0.1, 0.9), st.floats(1.1, 3.0)))
def test_no_box_holds_for_another_zero_of_the_derivative(k, factor):
    pytest.importorskip("mpmath")
    found = enclosed.clip(k, factor, enclosed.threshold_of)
    assert max(found.values()) > 1.0, found


@pytest.mark.parametrize("control", enclosed.CLAIM.controls, ids=lambda c: c.name)
@settings(max_examples=8)
@given(k=boxes)
def test_no_box_holds_for_a_wrong_closed_form(control, k):
    """q = 0.3 or κ, and κp + q in place of κ²p + q, on which both sides once agreed."""
    pytest.importorskip("mpmath")
    if control.name == "0.9 of the penalty's ½":
        k %= enclosed.CELLS // 10  # sharp for κ → 1 only
    assert not control.check({"k": k}).holds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", [stability, stability_linear])
@pytest.mark.parametrize("r", [2, pytest.param(3, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("seed", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_regularised_flow_stays_inside_its_estimate(module, dtype, device, r, seed):
    evidence = module.check(module.sample(seed, dtype, device, r=r))
    assert evidence.holds, evidence
    assert evidence.independent == 8


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(
    ("claim", "control"),
    [(c, k) for c in conditioning.CLAIMS for k in c.controls],
    ids=lambda x: getattr(x, "id", None) or x.name,
)
def test_control_is_rejected(claim, control, dtype, device):
    trials = 2 if claim.id.split("/")[1] in FLOWS + ENCLOSED else 16
    found = verify_control(claim, control, Settings(trials=trials, dtype=dtype, device=device))
    assert found.passed, found


@pytest.mark.parametrize(
    ("check", "extremal"),
    [
        (penalty_exponential.check, penalty_exponential.midway),
        (penalty_scale_free.check, penalty_scale_free.attained),
        (penalty_converse.check, penalty_converse.two_values),
        (penalty_weakly_convex.check, penalty_weakly_convex.attained),
        (k_tau_prox.check, k_tau_prox.attained),
    ],
    ids=lambda f: f.__module__.split(".")[-1],
)
def test_sharp_constant_is_attained_by_its_extremal_example(check, extremal, device):
    for seed in range(5):
        evidence = check(extremal(seed, torch.float64, device))
        assert evidence.holds
        assert evidence.ratio > 0.9


@given(r=st.integers(2, 7), K=st.floats(1.01, 50.0))
def test_extremal_spectrum_attains_the_scale_free_bound(r, K):
    squared = penalty_scale_free.extremal(r, K)
    assert float(squared.mean()) == pytest.approx(1.0)
    assert float(squared[0] / squared[-1]) == pytest.approx(K)
    assert bool((squared[1:-1] <= squared[0]).all())
    assert bool((squared[1:-1] >= squared[-1]).all())
    rho = float((squared - 1).norm())
    assert penalty_scale_free.sharp(rho, r) == pytest.approx((K - 1) / (K + 1))


@given(r=st.integers(2, 20), share=st.floats(0.01, 0.999))
def test_sharp_bound_is_never_above_samuelsons(r, share):
    rho = share * (r / (r - 1)) ** 0.5
    sharp, weaker = penalty_scale_free.sharp(rho, r), penalty_scale_free.samuelson(rho, r)
    assert sharp <= weaker * (1 + 1e-12)
    assert (r == 2) == (sharp == pytest.approx(weaker, rel=1e-9))


@given(r=st.integers(3, 8), tau=st.floats(0.01, 10.0))
def test_mean_clamp_moves_a_feasible_spectrum_and_the_projection_does_not(r, tau):
    s = torch.ones(r, dtype=torch.float64)
    s[0] = 1.0 + tau
    assert torch.equal(lrm.linalg.spectral_clip(torch.diag(s), tau), torch.diag(s))
    clamped = lrm.linalg.spectral_clip(torch.diag(s), tau, centre="mean")
    assert float((clamped - torch.diag(s)).norm()) == pytest.approx(mean_clamp.moved(r, tau))


@given(seed=seeds, r=st.integers(1, 7), tau=taus)
def test_threshold_is_consistent_with_its_own_counts(seed, r, tau):
    sample = exact_projection.sample(seed, torch.float64, torch.device("cpu"), r=r, tau=tau)
    s = torch.linalg.svdvals(sample["S"])
    if s[0] > (1.0 + tau) * s[-1]:
        t = exact_projection.threshold(s, 1.0 + tau)
        assert s[-1] <= t * (1 + 1e-12)
        assert t <= s[0] / (1.0 + tau) * (1 + 1e-12)


def test_no_claim_from_a_regulariser_that_allows_singular_cores():
    S = torch.diag(torch.tensor([1.0, 1e-9, 1e-9], dtype=torch.float64))
    assert not penalty_scale_free.check({"S": S}).hypotheses_met


def test_a_mean_clamp_of_other_singular_vectors_is_noticed(device, monkeypatch):
    """Farther from S than the projection it is anyway: the inequality alone would hold."""
    library = lrm.linalg.spectral_clip

    def transposed(S, tau, *, centre="metric"):
        found = library(S, tau, centre=centre)
        return found.mT if centre == "mean" else found

    sample = mean_clamp.sample(0, torch.float64, device, r=4, cond=10.0, tau=0.5)
    assert mean_clamp.check(sample).holds
    monkeypatch.setattr(lrm.linalg, "spectral_clip", transposed)
    assert not mean_clamp.check(sample).holds


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_a_condition_number_that_is_five_percent_off_is_noticed(device, monkeypatch, factor):
    library = lrm.linalg.condition_number
    sample = exact_projection.sample(0, torch.float64, device, r=4, cond=10.0, tau=0.5)
    assert exact_projection.check(sample).holds
    monkeypatch.setattr(lrm.linalg, "condition_number", lambda S: factor * library(S))
    assert not exact_projection.check(sample).holds
