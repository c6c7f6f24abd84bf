"""The claims about geometry at drawn sizes, ranks, condition numbers and seeds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lrmanifold as lrm
from theory import geometry
from theory.geometry import (
    cholesky_qr,
    curvature,
    gram_drift,
    normal_component,
    probe_gradient,
    projector_distance,
    prox_regularity,
    retraction_error,
    retraction_order,
    sin_theta,
    stiefel_order,
    tangent_space,
)
from theory.runner import Settings, verify_control

DTYPES = (torch.float64, torch.float32)
seeds = st.integers(0, 2**31 - 1)

# Claims that take (m, n, r, cond); the others have tests of their own below.
WITH_SIZES = [
    c
    for c in geometry.CLAIMS
    if c.id.split("/")[1]
    not in ("stiefel-order", "cholesky-qr", "gram-drift", "retraction-order", "probe-gradient")
]


@st.composite
def sizes(draw) -> dict[str, int]:
    m, n = draw(st.integers(2, 8)), draw(st.integers(2, 8))
    return {"m": m, "n": n, "r": draw(st.integers(1, min(m, n) - 1))}


def agrees(evidence) -> bool:
    """The check accepts the sample, or it is outside of the hypotheses."""
    return evidence.holds or not evidence.hypotheses_met


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("claim", WITH_SIZES, ids=lambda c: c.id)
@given(size=sizes(), seed=seeds, log_cond=st.floats(0, 1))
def test_claim_holds(claim, dtype, device, size, seed, log_cond):
    # Finite differences need moderate condition numbers; the rest is meant for all.
    cond = (1e3 if _any_cond(claim) else 10.0) ** log_cond
    evidence = claim.check(claim.sample(seed, dtype, device, **size, cond=cond))
    assert agrees(evidence), evidence


def _any_cond(claim) -> bool:
    """Whether the claim is meant for ill-conditioned points too: no finite differences in it."""
    return not claim.id.endswith(
        ("second-fundamental-form", "principal-curvatures", "projection-derivative")
    )


@given(m=st.integers(6, 40), n=st.integers(6, 40), r=st.integers(2, 5), seed=seeds)
def test_probe_gradient_does_not_see_the_condition_number(device, m, n, r, seed):
    for cond in (1e2, 1e4, 1e6):
        sample = probe_gradient.sample(seed, torch.float32, device, m=m, n=n, r=r, cond=cond)
        evidence = probe_gradient.check(sample)
        assert evidence.holds, evidence


def test_probe_gradient_looks_at_the_blocks_that_the_library_returns(device, monkeypatch):
    sample = probe_gradient.sample(0, torch.float32, device)
    assert probe_gradient.check(sample).holds
    right = lrm.FixedRank.egrad2rgrad
    for k in range(3):

        def wrong(M, X, G, k=k):
            return M.pack(
                *(0.999 * b if i == k else b for i, b in enumerate(M.unpack(right(M, X, G))))
            )

        monkeypatch.setattr(lrm.FixedRank, "egrad2rgrad", wrong)
        assert not probe_gradient.check(sample).holds


# an example is all retractions at once
@settings(max_examples=max(2, settings().max_examples // 3))
@given(size=sizes(), seed=seeds)
def test_every_retraction_has_its_order(device, size, seed):
    sample = retraction_order.sample(seed, torch.float64, device, **size)
    for name in lrm.retractions.available():
        evidence = retraction_order.check({**sample, "name": name})
        assert agrees(evidence), evidence


def test_an_order_is_claimed_for_every_retraction_of_the_library():
    assert set(retraction_order.ORDER) == set(lrm.retractions.available())


def test_a_retraction_without_a_claimed_order_is_skipped():
    sample = dict(retraction_order.sample(0, torch.float64, torch.device("cpu")))
    assert not retraction_order.check({**sample, "name": "svd"}, order={}).hypotheses_met


@given(r=st.integers(3, 5), extra=st.integers(1, 6), seed=seeds)
def test_stiefel_retractions_have_their_orders(device, r, extra, seed):
    sample = stiefel_order.sample(seed, torch.float64, device, n=r + extra, r=r)
    assert agrees(stiefel_order.check(sample))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(n=st.integers(2, 300), share=st.floats(0, 1), seed=seeds)
def test_cholesky_qr_is_as_orthogonal_as_claimed(device, dtype, n, share, seed):
    r = 1 + int(share * (min(n // 2, 16) - 1))
    assert agrees(cholesky_qr.check(cholesky_qr.sample(seed, dtype, device, n=n, r=r)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_the_true_gram_matrix_does_not_drift(device, dtype, seed):
    assert gram_drift.check(gram_drift.sample(seed, dtype, device)).holds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_sample_tells_the_known_increment_from_the_true_gram_matrix(device, dtype):
    samples = [gram_drift.sample(seed, dtype, device) for seed in range(3)]
    assert not any(gram_drift.check(sample, true=False).holds for sample in samples)


def test_the_known_increment_drifts(device):
    sample = gram_drift.sample(0, torch.float32, device)
    drifted, kept = (
        gram_drift.history(sample["U"], sample["steps"], true=true)[-1] for true in (False, True)
    )
    assert drifted > 10 * kept


@pytest.mark.parametrize("module", [prox_regularity, normal_component])
def test_points_of_lower_rank_are_drawn(module, device):
    """X of rank 0 to r: what the statements say of rank X <= r is seen for less than r."""
    samples = [module.sample(seed, torch.float64, device, m=6, n=5, r=3) for seed in range(60)]
    X = torch.stack([s["D"] + s["Y"].U @ s["Y"].S @ s["Y"].V.mT for s in samples])
    ranks = torch.linalg.matrix_rank(X, rtol=1e-8, atol=1e-8)
    assert set(ranks.tolist()) == {0, 1, 2, 3}


# -- controls and sharp constants


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("claim", "control"),
    [(c, k) for c in geometry.CLAIMS for k in c.controls],
    ids=lambda x: getattr(x, "id", None) or x.name,
)
def test_control_is_rejected(claim, control, dtype, device):
    found = verify_control(claim, control, Settings(trials=10, dtype=dtype, device=device))
    assert found.passed, found


@pytest.mark.parametrize(
    ("module", "extremal"),
    [
        (sin_theta, sin_theta.attained),
        (curvature, curvature.attained),
        (prox_regularity, prox_regularity.attained),
        (normal_component, normal_component.attained),
        (retraction_error, retraction_error.attained),
    ],
    ids=lambda x: getattr(x, "__name__", "").split(".")[-1],
)
def test_sharp_constant_is_attained_by_its_extremal_example(module, extremal, device):
    for seed in range(5):
        evidence = module.check(extremal(seed, torch.float64, device))
        assert evidence.holds
        assert evidence.ratio > 0.95


# -- hypotheses


def test_a_step_beyond_sigma_r_is_outside_of_the_retraction_bound(device):
    sample = dict(retraction_error.sample(1, torch.float64, device, m=5, n=4, r=2))
    manifold, X = sample["manifold"], sample["X"]
    S = manifold.unpack(X).S
    U_p, _, V_p = manifold.unpack(sample["xi"])
    sample["xi"] = manifold.pack(U_p, -S, V_p)
    assert not retraction_error.check(sample).hypotheses_met


def test_cholesky_qr_makes_no_claim_beyond_delta_1(device):
    sample = dict(cholesky_qr.sample(0, torch.float32, device, n=50, r=4))
    grown = 1e4 / sample["size"]
    sample.update(Delta=grown * sample["Delta"], size=1e4)
    assert not cholesky_qr.check(sample).hypotheses_met


@given(seed=seeds, n=st.integers(3, 7))
def test_projector_distance_vanishes_at_full_rank(device, seed, n):
    """Outside the hypothesis r < min(m, n) of L3.2: all directions are tangent."""
    sample = projector_distance.all_of_the_rank(seed, torch.float64, device)
    distance = projector_distance.projector_distance(sample["X"], sample["Y"])
    assert float(distance) < 1e-12


@pytest.mark.parametrize("block", range(3))
def test_blocks_of_a_projection_that_are_wrong_in_two_places_are_noticed(
    device, monkeypatch, block
):
    """What `project_ambient` gets wrong and `tangent_to_dense` undoes: the product is right."""
    project, dense = lrm.FixedRank.project_ambient, lrm.FixedRank.tangent_to_dense

    def flipped(M, xi):
        return M.pack(*(-b if k == block else b for k, b in enumerate(M.unpack(xi))))

    sample = tangent_space.sample(0, torch.float64, device, m=6, n=5, r=2)
    assert tangent_space.check(sample).holds
    monkeypatch.setattr(
        lrm.FixedRank, "project_ambient", lambda M, X, Z: flipped(M, project(M, X, Z))
    )
    monkeypatch.setattr(
        lrm.FixedRank, "tangent_to_dense", lambda M, X, xi: dense(M, X, flipped(M, xi))
    )
    assert not tangent_space.check(sample).holds
