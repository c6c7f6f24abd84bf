"""Points of FixedRank: packing, dense matrices, random points, projection, distance, checks."""

from __future__ import annotations

import math

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import best_approximation, dense, orthonormality, relative
from strategies import batches, gaussian, matrix, points, seeds, shapes, spectrum

import lrmanifold as lrm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
double = st.just(torch.float64)


# -- representation


@given(points())
def test_packing_is_stacking_and_unpacking_is_slicing(p):
    M = p.manifold
    factors = M.unpack(p.X)
    assert [f.shape[-2:] for f in factors] == [(M.m, M.rank), (M.rank, M.rank), (M.n, M.rank)]
    assert torch.equal(M.pack(*factors), p.X)
    for view in factors:
        assert view.untyped_storage().data_ptr() == p.X.untyped_storage().data_ptr()
    assert factors.U.shape == (*p.X.shape[:-2], M.m, M.rank)


@given(points())
def test_to_dense_is_u_s_v_transposed(p):
    M = p.manifold
    assert relative(M.to_dense(p.X), dense(p.X, M.m, M.n)) <= TOLERANCE[p.X.dtype]


@given(shapes, batches, seeds, st.sampled_from((torch.float64, torch.float32)))
def test_from_dense_is_the_best_approximation_of_its_rank(shape, batch, seed, dtype):
    m, n, r = shape
    M = lrm.FixedRank(m, n, r)
    W = gaussian(*batch, m, n, seed=seed, dtype=dtype)
    X = M.from_dense(W)
    assert X.dtype == dtype
    assert X.shape == (*batch, *M.point_shape)
    assert relative(dense(X, m, n), best_approximation(W.double(), r)) <= TOLERANCE[dtype]
    assert M.check_point_on_manifold(X, explain=True) == (True, None)


@given(points())
def test_from_dense_inverts_to_dense(p):
    M = p.manifold
    back = M.from_dense(M.to_dense(p.X))
    assert relative(dense(back, M.m, M.n), dense(p.X, M.m, M.n)) <= TOLERANCE[p.X.dtype]


def test_from_dense_refuses_what_has_no_approximation_of_this_rank():
    M = lrm.FixedRank(6, 5, 3)
    with pytest.raises(ValueError, match="rank at least 3, got numerical rank 2"):
        M.from_dense(gaussian(6, 2, seed=0) @ gaussian(2, 5, seed=1))
    with pytest.raises(ValueError, match=r"W must have shape \(..., 6, 5\), got \(5, 6\)"):
        M.from_dense(torch.ones(5, 6))
    with pytest.raises(ValueError, match="finite"):
        M.from_dense(torch.full((6, 5), torch.nan))


# -- random points


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_random_points_are_points_of_the_size_asked_for(dtype):
    M = lrm.FixedRank(7, 5, 3)
    for size in ((), M.point_shape, (2, 3, *M.point_shape), ((2, *M.point_shape),)):
        X = M.random(*size, dtype=dtype)
        assert isinstance(X, geoopt.ManifoldTensor)
        assert X.manifold is M
        assert X.dtype == dtype
        tol = 1e-2 if dtype == torch.bfloat16 else 1e-6
        assert M.check_point_on_manifold(X, atol=tol, rtol=tol)
    with pytest.raises(ValueError, match=r"must have shape \(..., 15, 3\)"):
        M.random(7, 3)


def test_random_is_reproducible_by_its_generator():
    M = lrm.FixedRank(7, 5, 3)
    draw = [M.random(generator=torch.Generator().manual_seed(k)) for k in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_random_points_have_uniform_factors_and_mean_square_rank():
    """E U = 0, E uᵢuⱼ = δ/m for a Haar-uniform frame, and E‖W‖² = r; five standard errors."""
    M, count = lrm.FixedRank(6, 4, 2), 20_000
    generator = torch.Generator().manual_seed(3)
    X = M.random(count, *M.point_shape, dtype=torch.float64, generator=generator)
    U, S, V = M.unpack(torch.Tensor(X))
    for Q, k in ((U, 6), (V, 4)):
        assert float(Q.mean(0).abs().max()) <= 5 / math.sqrt(k * count)
        moment = torch.einsum("bia,bja->ija", Q, Q) / count
        eye = torch.eye(k, dtype=torch.float64)[..., None] / k
        assert float((moment - eye).abs().max()) <= 5 * math.sqrt(2.0 / count) / k
    sizes = S.square().sum((-2, -1))
    assert abs(float(sizes.mean()) - 2) <= 5 * float(sizes.std()) / math.sqrt(count)


def test_origin_is_the_first_columns_of_the_identities():
    M = lrm.FixedRank(5, 4, 2)
    X = M.origin(3, *M.point_shape, dtype=torch.float64)
    assert torch.equal(
        M.to_dense(torch.Tensor(X))[1], torch.eye(5, 4).double() * (torch.arange(4) < 2)
    )
    assert torch.equal(X[0], X[2])


# -- projection and drift


@given(points(), seeds)
def test_projx_keeps_the_matrix_of_a_drifted_tensor(p, seed):
    M = p.manifold
    drifted = p.X + 1e-3 * gaussian(*p.X.shape, seed=seed, dtype=p.X.dtype)
    Y = M.projx(drifted)
    assert float(M.drift(Y).max()) <= 3 * TOLERANCE[p.X.dtype]
    assert relative(dense(Y, M.m, M.n), dense(drifted, M.m, M.n)) <= 3 * TOLERANCE[p.X.dtype]
    assert relative(M.projx(Y), Y) <= 3 * TOLERANCE[p.X.dtype]


@given(points(), seeds)
def test_drift_is_the_worse_of_the_two_orthonormality_defects(p, seed):
    M = p.manifold
    X = p.X + 1e-2 * gaussian(*p.X.shape, seed=seed, dtype=p.X.dtype)
    expected = max(orthonormality(M.unpack(X).U), orthonormality(M.unpack(X).V))
    assert float(M.drift(X).max()) == pytest.approx(expected, rel=1e-3)
    assert M.drift(X).shape == X.shape[:-2]


# -- measurements


@given(points())
def test_dist_is_the_frobenius_distance_of_the_matrices(p):
    M, Y = p.manifold, p.another()
    exact = torch.linalg.matrix_norm(dense(p.X, M.m, M.n) - dense(Y, M.m, M.n))
    assert float((M.dist(p.X, Y) - exact).abs().max()) <= TOLERANCE[p.X.dtype]
    assert M.dist(p.X, Y, keepdim=True).shape == (*p.X.shape[:-2], 1, 1)
    assert float(M.dist(p.X, p.X).max()) <= TOLERANCE[p.X.dtype]


def test_dist_does_not_cancel_for_near_points():
    M = lrm.FixedRank(9, 8, 3)
    X = torch.Tensor(M.random(dtype=torch.float64))
    Y = M.retr(X, 1e-10 * M.proju(X, torch.randn_like(X)))
    exact = torch.linalg.matrix_norm(dense(X, 9, 8) - dense(Y, 9, 8))
    assert float(M.dist(X, Y)) == pytest.approx(float(exact), rel=1e-4)


@given(points(dtypes=double))
def test_svdvals_and_cond_are_those_of_the_dense_matrix(p):
    M, r = p.manifold, p.manifold.rank
    s = torch.linalg.svdvals(dense(p.X, M.m, M.n))[..., :r]
    assert float((M.svdvals(p.X) - s).abs().max()) <= 1e-12
    assert relative(M.cond(p.X)[..., None, None], (s[..., 0] / s[..., -1])[..., None, None]) <= 1e-8


# -- checks that say what is wrong


def _point(batch=()):
    return torch.Tensor(lrm.FixedRank(6, 5, 2).random(*batch, 13, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (slice(0, 6), r"factor U is not orthonormal: max \|UᵀU - I\| = 2.10e-01"),
        (slice(8, 13), r"factor V is not orthonormal: max \|VᵀV - I\| = 2.10e-01"),
    ],
)
def test_a_scaled_factor_is_named_with_how_far_it_is_off(rows, message):
    M, X = lrm.FixedRank(6, 5, 2), _point((3,))
    X[1, rows] *= 1.1
    assert not M.check_point_on_manifold(X)
    with pytest.raises(ValueError, match=message):
        M.assert_check_point_on_manifold(X)


def test_other_wrong_points_are_named():
    M, X = lrm.FixedRank(6, 5, 2), _point()
    singular, nan = X.clone(), X.clone()
    M.unpack(singular).S.zero_()
    nan[3, 1] = torch.nan
    for wrong, message in (
        (singular, "core S is singular"),
        (nan, "NaN or Inf"),
        (X[:-1], r"must have shape (..., 13, 2) = (..., m + r + n, r), got (12, 2)"),
        (X.T, r"must have shape (..., 13, 2) = (..., m + r + n, r), got (2, 13)"),
        (X[:, 0], "requires more than 2 dim"),
    ):
        ok, reason = M.check_point_on_manifold(wrong, explain=True)
        assert not ok
        assert message in reason
        assert not M.check_point_on_manifold(wrong)
    assert M.check_point_on_manifold(X, explain=True) == (True, None)


def test_a_core_below_the_normal_numbers_of_float16_is_a_point():
    """Those begin at 6.1e-5; all that divides by S does so in float32."""
    wide, capped = lrm.FixedRank(6, 5, 2), lrm.WellConditioned(6, 5, 2, tau=1.0)
    for s, M in (((1.0, 1e-5), wide), ((3e-5, 2e-5), capped)):
        X = M.pack(torch.eye(6, 2), torch.diag(torch.tensor(s)), torch.eye(5, 2)).half()
        assert M.check_point_on_manifold(X, explain=True) == (True, None)


def test_vectors_off_the_tangent_space_are_named():
    M, X = lrm.FixedRank(6, 5, 2), _point()
    xi = M.proju(X, torch.randn_like(X))
    assert M.check_vector_on_tangent(X, xi, explain=True) == (True, None)
    for rows, message in (
        (slice(0, 6), "block U_p is not orthogonal to U: max |UᵀU_p| = 5.00e-01"),
        (slice(8, 13), "block V_p is not orthogonal to V: max |VᵀV_p| = 5.00e-01"),
    ):
        wrong = xi.clone()
        wrong[rows] += 0.5 * X[rows]
        ok, reason = M.check_vector_on_tangent(X, wrong, explain=True)
        assert not ok
        assert message in reason
    assert M.check_vector_on_tangent(X, xi * torch.nan, explain=True) == (
        False,
        "`u` holds NaN or Inf",
    )


def test_empty_batches_pass_through():
    M = lrm.FixedRank(6, 5, 2)
    X = M.random(0, *M.point_shape)
    assert M.check_point_on_manifold(X, explain=True) == (True, None)
    assert M.check_vector_on_tangent(X, X, explain=True) == (True, None)
    for result in (
        M.retr(X, X),
        M.expmap(X, X),
        M.projx(X),
        M.egrad2rgrad(X, X),
        M.transp(X, X, X),
    ):
        assert result.shape == X.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 6}, r"rank must be in 1..min\(m, n\) = 5, got 6"),
        ({"rank": 0}, r"rank must be in 1..min\(m, n\) = 5, got 0"),
        ({"m": 0}, "m must be an integer >= 1, got 0"),
        ({"n": -3}, "n must be an integer >= 1, got -3"),
        ({"retraction": "qr"}, r"retraction must be one of .*'svd', or a function, got 'qr'"),
        ({"gradient": "dense"}, "gradient must be 'factors' or 'probe', got 'dense'"),
    ],
)
def test_impossible_manifolds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lrm.FixedRank(**{"m": 6, "n": 5, "rank": 2, **arguments})


def test_factors_of_the_wrong_shape_are_named():
    M = lrm.FixedRank(6, 5, 2)
    U, S, V = M.unpack(_point())
    with pytest.raises(ValueError, match=r"U must have shape \(..., 6, 2\), got \(5, 2\)"):
        M.pack(V, S, U)
    with pytest.raises(ValueError, match=r"S must have shape \(..., 2, 2\), got \(2, 1\)"):
        M.pack(U, S[:, :1], V)
    with pytest.raises(ValueError, match=r"X must have shape \(..., 13, 2\)"):
        M.unpack(U)


def test_complex_and_integer_tensors_are_refused():
    M = lrm.FixedRank(6, 5, 2)
    for dtype in (torch.complex64, torch.int64):
        X = M.origin(dtype=dtype).as_subclass(torch.Tensor)
        for method in (M.to_dense, lambda X: M.proju(X, X), lambda X: M.egrad2rgrad(X, X)):
            with pytest.raises(TypeError, match=f"X must be a real floating .* {dtype}"):
                method(X)


def test_half_precision_is_computed_in_float32_and_returned_in_half():
    M = lrm.FixedRank(8, 6, 3)
    X = M.random(2, *M.point_shape, dtype=torch.bfloat16)
    wide = torch.Tensor(X).float()
    xi = 0.1 * M.proju(wide, torch.randn(wide.shape))
    u = xi.bfloat16()
    results = {
        "retr": (M.retr(X, u), M.retr(wide, u.float())),
        "egrad2rgrad": (M.egrad2rgrad(X, u), M.egrad2rgrad(wide, u.float())),
        "transp": (M.transp(X, X, u), M.transp(wide, wide, u.float())),
        "projx": (M.projx(X), M.projx(wide)),
        "retr, by name": (M.retr(x=X, u=u), M.retr(wide, u.float())),
        "projx, by name": (M.projx(x=X), M.projx(wide)),
    }
    for name, (half, full) in results.items():
        assert half.dtype == torch.bfloat16, name
        assert torch.equal(half, full.bfloat16()), name


def test_printing_says_what_it_is():
    assert repr(lrm.FixedRank(6, 5, 2)) == "FixedRank(m=6, n=5, rank=2, retraction='svd') manifold"


def test_matrices_of_clustered_spectrum_are_ordinary_points():
    W = matrix(spectrum("clustered", 4, 1.0, 0), 7, 0, n=6)
    M = lrm.FixedRank(7, 6, 4)
    assert relative(M.to_dense(M.from_dense(W)), W) <= 1e-12
