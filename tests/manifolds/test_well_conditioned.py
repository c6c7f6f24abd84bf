"""The set of well-conditioned matrices: what all its maps return, and the nearest of its points."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import dense, relative
from strategies import batches, gaussian, matrix, orthonormal, seeds, shapes, spectrum, taus

import lrmanifold as lrm
from lrmanifold import linalg

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
dtypes = st.sampled_from((torch.float64, torch.float32))
small_taus = st.sampled_from((0.0, 1e-3, 0.1, 1.0))


def excess(manifold, X) -> float:
    """By how much cond exceeds 1 + τ, relatively, measured in float64 from the dense matrix."""
    W = dense(torch.Tensor(X), manifold.m, manifold.n)
    s = torch.linalg.svdvals(W)[..., : manifold.rank]
    return float((s[..., 0] / s[..., -1]).max()) / (1 + manifold.tau) - 1


def case(shape, batch, seed, dtype, tau, **options):
    """A manifold, a point of FixedRank outside of its set, and a tangent vector."""
    m, n, r = shape
    M = lrm.WellConditioned(m, n, r, tau=tau, **options)
    U, V = orthonormal(*batch, m, r, seed=seed), orthonormal(*batch, n, r, seed=seed + 1)
    S = matrix(spectrum("random", r, 30.0, seed, batch), r, seed + 2)
    X = torch.cat((U, S, V), -2).to(dtype)
    return M, X, M.proju(X, gaussian(*X.shape, seed=seed + 3, dtype=dtype))


@given(shapes, batches, seeds, dtypes, small_taus, st.sampled_from(("metric", "mean")))
def test_every_map_returns_points_of_the_set(shape, batch, seed, dtype, tau, centre):
    M, outside, xi = case(shape, batch, seed, dtype, tau, centre=centre)
    X = M.projx(outside)
    points = {
        "projx": X,
        "retr": M.retr(X, xi),
        "retr_transp": M.retr_transp(X, xi, xi)[0],
        "random": M.random(*batch, *M.point_shape, dtype=dtype),
        "origin": M.origin(*batch, *M.point_shape, dtype=dtype),
        "from_dense": M.from_dense(M.to_dense(outside)),
    }
    for name, Y in points.items():
        assert excess(M, Y) <= TOLERANCE[dtype], name
        assert M.check_point_on_manifold(Y, explain=True) == (True, None), name


@pytest.mark.parametrize("name", lrm.retractions.available())
@given(shape=shapes, seed=seeds, tau=small_taus)
def test_every_retraction_ends_in_the_set_even_after_a_wild_step(name, shape, seed, tau):
    M, X, xi = case(shape, (2,), seed, torch.float64, tau, retraction=name)
    Y = M.retr(M.projx(X), 5.0 * xi)
    assert excess(M, Y) <= 1e-11
    assert float(M.drift(Y).max()) <= 1e-12


def test_geodesics_end_in_the_set_too():
    M, X, xi = case((6, 5, 3), (2,), 0, torch.float64, 0.1)
    assert excess(M, M.expmap(M.projx(X), 0.05 * xi)) <= 1e-12


@given(shapes, batches, seeds, taus)
def test_from_dense_and_projx_give_the_nearest_matrix_of_the_set(shape, batch, seed, tau):
    """Lemma 4.2: truncate, then project the singular values; no rival of the set is nearer."""
    m, n, r = shape
    M = lrm.WellConditioned(m, n, r, tau=tau)
    W = gaussian(*batch, m, n, seed=seed)
    X = M.from_dense(W)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    values = linalg.clip_values(s[..., :r], tau)
    expected = (U[..., :r] * values[..., None, :]) @ Vh[..., :r, :]
    assert relative(dense(X, m, n), expected) <= 1e-10
    ours = torch.linalg.matrix_norm(W - dense(X, m, n))
    for k in range(3):
        other = dense(X, m, n) + 0.1 * gaussian(*batch, m, n, seed=seed + k)
        rival = dense(M.from_dense(other), m, n)
        assert bool((ours <= torch.linalg.matrix_norm(W - rival) * (1 + 1e-12)).all())


@given(shapes, batches, seeds, dtypes, small_taus)
def test_projx_is_idempotent_and_retraction_of_zero_is_the_point(shape, batch, seed, dtype, tau):
    M, X, _ = case(shape, batch, seed, dtype, tau)
    X = M.projx(X)
    for Y in (M.projx(X), M.retr(X, torch.zeros_like(X))):
        assert relative(dense(Y, M.m, M.n), dense(X, M.m, M.n)) <= TOLERANCE[dtype]


def test_from_dense_completes_a_deficient_matrix_but_refuses_zero():
    M = lrm.WellConditioned(6, 5, 3, tau=0.5)
    W = gaussian(6, 1, seed=0) @ gaussian(1, 5, seed=1)
    assert excess(M, M.from_dense(W)) <= 1e-12
    with pytest.raises(ValueError, match="W must not be zero"):
        M.from_dense(torch.zeros(6, 5))


@given(
    shapes, batches, seeds, dtypes, small_taus, st.sampled_from(("free", 1.0)), st.integers(1, 4)
)
def test_deficient_cores_and_matrices_have_a_nearest_point(
    shape, batch, seed, dtype, tau, scale, rank
):
    m, n, r = shape
    M = lrm.WellConditioned(m, n, r, tau=tau, scale=scale)
    s = torch.arange(r, 0, -1, dtype=torch.float64).where(torch.arange(r) < rank, 0.0)
    for core in (torch.diag_embed(s), matrix(s.expand(*batch, r), r, seed)):
        found = M.project_core(core.to(dtype)).double()
        tol = TOLERANCE[dtype]
        near = M.project_spectrum(s)[:, None]
        assert relative(torch.linalg.svdvals(found)[..., None], near) <= tol
        # As near as the spectra: von Neumann's trace inequality.
        gap = float((M.project_spectrum(s) - s).square().sum())
        assert float((found - core).square().sum((-2, -1)).max()) <= gap * (1 + tol) + tol
    W = torch.nn.functional.pad(torch.diag_embed(s), (0, n - r, 0, m - r)).to(dtype)
    assert excess(M, M.from_dense(W)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("scale", ["free", 1.0])
@pytest.mark.parametrize("r", [1, 3])
def test_the_zero_core_has_no_nearest_point_whatever_the_bounds(tau, scale, r):
    M = lrm.WellConditioned(6, 5, r, tau=tau, scale=scale)
    with pytest.raises(ValueError, match="S must not be the zero matrix"):
        M.project_core(torch.stack((torch.eye(r), torch.zeros(r, r))))


def test_tau_zero_holds_the_scaled_partial_isometries():
    M = lrm.WellConditioned(6, 5, 3, tau=0.0)
    W = M.to_dense(torch.Tensor(M.random(dtype=torch.float64)))
    alpha2 = float(W.square().sum()) / 3
    assert relative(W @ W.mT @ W, alpha2 * W) <= 1e-12


def test_points_outside_are_named_with_their_condition_number():
    M, X, _ = case((6, 5, 3), (), 0, torch.float64, 0.5)
    ok, reason = M.check_point_on_manifold(X, explain=True)
    assert not ok
    assert reason == "core S is not well-conditioned: cond(S) = 30 > 1 + tau = 1.5"
    assert M.check_point_on_manifold(M.projx(X), explain=True) == (True, None)


@pytest.mark.parametrize("tau", [-1e-3, math.inf, math.nan])
def test_impossible_tau_is_refused(tau):
    with pytest.raises(ValueError, match="tau must be a finite number >= 0, got"):
        lrm.WellConditioned(6, 5, 3, tau=tau)


def test_other_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="centre must be 'metric' or 'mean', got 'median'"):
        lrm.WellConditioned(6, 5, 3, tau=0.1, centre="median")
    with pytest.raises(ValueError, match="rank must be"):
        lrm.WellConditioned(6, 5, 6, tau=0.1)
    with pytest.raises(TypeError, match="tau"):
        lrm.WellConditioned(6, 5, 3)


def test_random_is_on_average_as_large_as_for_every_tau():
    """The projection keeps ‖W‖² near r; the frames are those of FixedRank."""
    for tau in (0.0, 0.5):
        M = lrm.WellConditioned(8, 7, 4, tau=tau)
        X = torch.Tensor(M.random(2000, *M.point_shape, dtype=torch.float64))
        assert 0.6 <= float(M.unpack(X).S.square().sum((-2, -1)).mean()) / 4 <= 1.1


def test_copies_and_printing_keep_all_choices():
    M = lrm.WellConditioned(6, 5, 3, tau=0.1, centre="mean", retraction="ksl")
    assert repr(copy.deepcopy(M)) == repr(M)
    assert "m=6, n=5, rank=3, retraction='ksl', tau=0.1, centre='mean'" in repr(M)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_points_are_computed_in_float32(dtype):
    M, X, xi = case((12, 10, 4), (), 0, torch.float32, 0.1)
    X, u = M.projx(X).to(dtype), (0.1 * xi).to(dtype)
    Y = M.retr(X, u)
    assert Y.dtype == dtype
    assert torch.equal(Y, M.retr(X.float(), u.float()).to(dtype))
