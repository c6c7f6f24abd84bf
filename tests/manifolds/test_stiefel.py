"""Stiefel: retractions and their orders, cost without n x n matrices, uniform points."""

from __future__ import annotations

import math

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import LargestTensor, orthonormality, relative
from strategies import batches, dtypes, gaussian, orthonormal, seeds

import lrmanifold as lrm
from lrmanifold.testing import check_retraction, random_tangent

RETRACTIONS = ("polar", "qr", "cayley")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
sizes = st.sampled_from(((7, 3), (5, 5), (6, 1), (1, 1), (12, 4)))


@st.composite
def frames(draw, dtypes=dtypes):
    """A batch of frames with two tangent vectors each."""
    (n, r), batch, seed = draw(sizes), draw(batches), draw(seeds)
    M = lrm.Stiefel()
    X = orthonormal(*batch, n, r, seed=seed).to(draw(dtypes))
    return X, *(M.proju(X, gaussian(*X.shape, seed=seed + k, dtype=X.dtype)) for k in (1, 2))


@given(frames())
def test_projection_is_that_of_geoopt_and_its_vectors_are_tangent(case):
    X, xi, _ = case
    M, Z = lrm.Stiefel(), gaussian(*X.shape, seed=0, dtype=X.dtype)
    assert relative(M.proju(X, Z), geoopt.EuclideanStiefel().proju(X, Z)) <= TOLERANCE[X.dtype]
    assert float((X.mT @ xi + xi.mT @ X).abs().max()) <= TOLERANCE[X.dtype] * (1 + float(xi.norm()))
    assert relative(M.proju(X, xi), xi) <= 10 * TOLERANCE[X.dtype]


@pytest.mark.parametrize("retraction", RETRACTIONS)
@given(case=frames())
def test_retraction_lands_on_the_manifold_and_keeps_the_point_at_zero(retraction, case):
    X, xi, eta = case
    M = lrm.Stiefel(retraction)
    for t in (0.01, 1.0, 10.0):
        assert orthonormality(M.retr(X, t * xi)) <= TOLERANCE[X.dtype]
    assert relative(M.retr(X, 0 * xi), X) <= TOLERANCE[X.dtype]
    Y, moved = M.retr_transp(X, xi, eta)
    assert torch.equal(Y, M.retr(X, xi))
    assert M.check_vector_on_tangent(Y, moved, explain=True) == (True, None)


@given(frames())
def test_qr_retraction_and_geodesic_are_those_of_geoopt(case):
    X, xi, _ = case
    theirs = geoopt.EuclideanStiefel()
    xi = xi / (1 + torch.linalg.matrix_norm(xi)[..., None, None])
    assert relative(lrm.Stiefel("qr").retr(X, xi), theirs.retr(X, xi)) <= 10 * TOLERANCE[X.dtype]
    assert relative(lrm.Stiefel().expmap(X, xi), theirs.expmap(X, xi)) <= 10 * TOLERANCE[X.dtype]


@given(frames(dtypes=st.just(torch.float64)))
def test_polar_retraction_is_the_nearest_frame_and_commutes_with_rotations(case):
    X, xi, _ = case
    U, _, Vh = torch.linalg.svd(X + xi, full_matrices=False)
    Y = lrm.Stiefel().retr(X, xi)
    assert relative(Y, U @ Vh) <= 1e-11
    A = orthonormal(X.shape[-1], X.shape[-1], seed=9)
    assert relative(lrm.Stiefel().retr(X @ A, xi @ A), Y @ A) <= 1e-11


@given(frames(dtypes=st.just(torch.float64)))
def test_cayley_retraction_is_the_transform_of_the_n_by_n_matrix(case):
    """(I - W/2)⁻¹ (I + W/2) X with W = P ξ Xᵀ - X ξᵀ P and P = I - XXᵀ/2, formed densely here."""
    X, xi, _ = case
    eye = torch.eye(X.shape[-2], dtype=X.dtype)
    P = eye - 0.5 * X @ X.mT
    W = P @ xi @ X.mT - X @ xi.mT @ P
    expected = torch.linalg.solve(eye - 0.5 * W, (eye + 0.5 * W) @ X)
    assert relative(lrm.Stiefel("cayley").retr(X, xi), expected) <= 1e-10


@pytest.mark.parametrize(("retraction", "slope"), [("polar", 3.0), ("qr", 2.0), ("cayley", 2.0)])
def test_order_in_the_euclidean_metric(retraction, slope):
    """Polar is of second order; QR and, for this metric, Cayley of first."""
    report = check_retraction(lrm.Stiefel(retraction), order=round(slope) - 1, size=(8, 3))
    report.raise_if_failed()
    assert report.slopes["tangent"] == pytest.approx(2.0, abs=0.05)
    assert report.slopes["geodesic"] == pytest.approx(slope, abs=0.05)


def _slope(retraction, exact, X, xi, distance=lambda A, B: A - B):
    """Log-log slope of ‖R(tξ) - exact(tξ)‖ between t = 1e-2 and t = 1e-3."""
    error = [float(distance(retraction(X, t * xi), exact(X, t * xi)).norm()) for t in (1e-2, 1e-3)]
    return math.log10(error[0] / error[1])


def _horizontal(n=8, r=3):
    X = orthonormal(n, r, seed=0)
    Z = gaussian(n, r, seed=1)
    return X, Z - X @ (X.mT @ Z)


def test_cayley_is_second_order_for_the_canonical_metric():
    X, theirs = orthonormal(8, 3, seed=0), geoopt.CanonicalStiefel()
    xi = lrm.Stiefel().proju(X, gaussian(8, 3, seed=1))

    def canonical_geodesic(X, u):
        """Y = [X Q] exp([[A, -Rᵀ], [R, 0]]) [I; 0] (Edelman, Arias, Smith 1998, theorem 2.1)."""
        A = X.mT @ u
        Q, R = torch.linalg.qr(u - X @ A)
        block = torch.cat((torch.cat((A, -R.mT), -1), torch.cat((R, torch.zeros(3, 3)), -1)), -2)
        return torch.cat((X, Q), -1) @ torch.linalg.matrix_exp(block)[:, :3]

    ours = lrm.Stiefel("cayley").retr
    assert _slope(ours, canonical_geodesic, X, xi) == pytest.approx(3.0, abs=0.1)
    assert _slope(lrm.Stiefel("polar").retr, canonical_geodesic, X, xi) == pytest.approx(2, abs=0.1)
    # geoopt's canonical retraction takes a gradient-like argument; on horizontal ones it agrees
    X, xi = _horizontal()
    assert relative(ours(X, xi), theirs.retr(X, xi)) <= 1e-12


def test_on_horizontal_vectors_polar_and_cayley_are_second_order_and_qr_only_as_a_subspace():
    X, xi = _horizontal()
    exact = lrm.Stiefel().expmap
    for retraction, slope in (("polar", 3.0), ("cayley", 3.0), ("qr", 2.0)):
        measured = _slope(lrm.Stiefel(retraction).retr, exact, X, xi)
        assert measured == pytest.approx(slope, abs=0.1), retraction
    qr = lrm.Stiefel("qr").retr
    subspace = _slope(qr, exact, X, xi, lambda A, B: A @ A.mT - B @ B.mT)
    assert subspace == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_no_method_forms_an_n_by_n_matrix(retraction):
    n, r = 400, 3
    M = lrm.Stiefel(retraction)
    X = torch.Tensor(M.random(n, r))
    xi = 0.1 * random_tangent(M, X)
    with LargestTensor() as record:
        M.egrad2rgrad(X, xi)
        M.retr_transp(X, xi, xi)
        M.expmap(X, xi)
        M.projx(X + xi)
        M.random(n, r)
    assert record.numel <= 2 * n * r
    with LargestTensor() as record:
        geoopt.CanonicalStiefel().retr(X, xi)
    assert record.numel == n * n  # what the recorder would have seen


@pytest.mark.parametrize("length", [1.0, 100.0])
def test_long_geodesics_end_on_the_manifold_in_float32(length):
    M = lrm.Stiefel()
    X = orthonormal(9, 4, seed=0)
    xi = M.proju(X, gaussian(9, 4, seed=1))
    xi = (xi * (length / xi.norm())).float()
    Y = M.expmap(X.float(), xi)
    assert Y.dtype == torch.float32
    assert float(M.drift(Y)) <= 1e-6 * (1.0 + 0.1 * length)


def test_geodesic_has_constant_speed_and_zero_tangential_acceleration():
    M, h = lrm.Stiefel(), 1e-3
    X = orthonormal(7, 3, seed=0)
    xi = M.proju(X, gaussian(7, 3, seed=1))
    for t in (0.0, 0.7):
        points = [M.expmap(X, s * xi) for s in (t - h, t, t + h)]
        speed = (points[2] - points[0]).norm() / (2 * h)
        acceleration = (points[2] - 2 * points[1] + points[0]) / h**2
        assert float(speed) == pytest.approx(float(xi.norm()), rel=1e-5)
        assert float(M.proju(points[1], acceleration).norm()) <= 1e-4 * float(acceleration.norm())


# -- points


def _assert_haar(sample):
    """E Q = 0, E qᵢₐqⱼᵦ = δδ/n and the fourth moment 3/(n(n+2)); five standard errors each."""
    count, n, _ = sample.shape
    error = 5 / math.sqrt(count)
    assert float(sample.mean(0).abs().max()) <= error / math.sqrt(n)
    flat = sample.flatten(1)
    moment = flat.mT @ flat / count - torch.eye(flat.shape[1], dtype=flat.dtype) / n
    assert float(moment.abs().max()) <= error * math.sqrt(2) / n
    fourth = float(sample[:, 0, 0].pow(4).mean())
    assert abs(fourth - 3 / (n * (n + 2))) <= error * float(sample[:, 0, 0].pow(4).std())
    # a QR without sign fix has a diagonal of one sign: its mean is what the first test sees,
    # and rotating a Haar sample must not change its distribution
    A = orthonormal(n, n, seed=5)
    assert float((A @ sample).mean(0).abs().max()) <= error / math.sqrt(n)


def test_random_frames_are_haar_uniform():
    M, generator = lrm.Stiefel(), torch.Generator().manual_seed(11)
    _assert_haar(torch.Tensor(M.random(20_000, 5, 3, dtype=torch.float64, generator=generator)))


def test_the_uniformity_test_notices_frames_that_are_not_uniform():
    Q, R = torch.linalg.qr(gaussian(20_000, 5, 3, seed=11))
    Q = Q * torch.sign(R.diagonal(dim1=-2, dim2=-1))[..., None, :]
    _assert_haar(Q)
    with pytest.raises(AssertionError):
        _assert_haar(Q * torch.sign(Q[:, :1]))
    with pytest.raises(AssertionError):
        _assert_haar(torch.linalg.qr(gaussian(20_000, 5, 3, seed=11) + 0.1).Q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_random_and_origin_are_points_of_the_size_asked_for(dtype):
    M = lrm.Stiefel()
    tol = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for X in (M.random(2, 3, 7, 3, dtype=dtype), M.origin(2, 3, 7, 3, dtype=dtype)):
        assert X.shape == (2, 3, 7, 3)
        assert X.dtype == dtype
        assert X.manifold is M
        assert M.check_point_on_manifold(X, atol=tol, rtol=tol)


# -- words


def test_wrong_points_and_vectors_are_described():
    M = lrm.Stiefel()
    X = torch.Tensor(M.random(2, 6, 3, dtype=torch.float64))
    xi = M.proju(X, torch.randn_like(X))
    for wrong, message in (
        (1.1 * X, "columns are not orthonormal: max |XᵀX - I| = 2.10e-01"),
        (X * torch.nan, "NaN or Inf"),
        (X.mT, "needs n >= r, got n = 3 rows, r = 6 columns"),
    ):
        ok, reason = M.check_point_on_manifold(wrong, explain=True)
        assert not ok
        assert message in reason
    ok, reason = M.check_vector_on_tangent(X, xi + X, explain=True)
    assert not ok
    assert "Xᵀu is not skew: max |Xᵀu + uᵀX|" in reason
    assert M.check_vector_on_tangent(X, xi, explain=True) == (True, None)
    assert M.check_point_on_manifold(X[:0], explain=True) == (True, None)


def test_unknown_retractions_and_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="retraction must be one of 'polar', 'qr', 'cayley'"):
        lrm.Stiefel("svd")
    for method in (lrm.Stiefel().random, lrm.Stiefel().origin):
        with pytest.raises(ValueError, match="needs n >= r"):
            method(3, 5)
    with pytest.raises(ValueError, match="full column rank"):
        lrm.Stiefel().projx(torch.ones(4, 2))


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_half_precision_is_computed_in_float32(retraction):
    M = lrm.Stiefel(retraction)
    X = torch.Tensor(M.random(20, 4)).bfloat16()
    u = (0.1 * torch.randn(20, 4)).bfloat16()
    assert torch.equal(M.retr(X, u), M.retr(X.float(), u.float()).bfloat16())
    assert M.projx(X).dtype == torch.bfloat16
