"""pymanopt's optimizers on our manifold, and conversions to and from its FixedRankEmbedded."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SHAPES, gaussian, orthonormal, packed_point, seeds
from torch import Tensor

import lrmanifold as lrm

pymanopt = pytest.importorskip("pymanopt")

from lrmanifold.interop.pymanopt import (  # noqa: E402
    PackedFixedRank,
    point_from_pymanopt,
    point_to_pymanopt,
    tangent_from_pymanopt,
    tangent_to_pymanopt,
)

shapes = st.sampled_from(SHAPES)


def completion(m: int, n: int, r: int, share: float, seed: int, noise: float = 0.0):
    """A pymanopt space and the problem ½ ‖P_Ω(W - A)‖² for a random A of rank r."""
    manifold = lrm.FixedRank(m, n, r)
    A = gaussian(m, r, seed=seed) @ gaussian(r, n, seed=seed + 1)
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(seed + 2)) < share
    B = A + noise * gaussian(m, n, seed=seed + 3)
    space = PackedFixedRank(manifold)

    @pymanopt.function.pytorch(space)
    def cost(X):
        return 0.5 * (mask * (manifold.to_dense(X) - B)).square().sum()

    start = manifold.from_dense(mask * B / share).numpy()
    return space, pymanopt.Problem(space, cost), A, start


def gradient_norm(space, problem, X) -> float:
    return space.norm(X, problem.riemannian_gradient(X))


def error(space, X, A: Tensor) -> float:
    return float((space.manifold.to_dense(torch.from_numpy(X)) - A).norm() / A.norm())


# -- optimizers


@pytest.mark.parametrize("noise", [0.0, 1e-2])
def test_trust_regions_converge_on_completion_to_gradient_norm_1e_6(noise):
    space, problem, A, start = completion(40, 30, 3, 0.5, seed=5, noise=noise)
    optimizer = pymanopt.optimizers.TrustRegions(
        min_gradient_norm=1e-7, max_iterations=60, verbosity=0
    )
    result = optimizer.run(problem, initial_point=start)
    assert gradient_norm(space, problem, result.point) <= 1e-6
    assert space.manifold.check_point_on_manifold(torch.from_numpy(result.point))
    assert error(space, result.point, A) <= (1e-6 if noise == 0.0 else 2e-2)


def test_the_hessian_makes_trust_regions_converge_quadratically():
    """A Newton step squares the gradient; with a wrong curvature term it only divides it."""
    space, problem, _, start = completion(20, 15, 2, 0.7, seed=1, noise=0.3)
    norms = []
    for iterations in range(3, 12):
        optimizer = pymanopt.optimizers.TrustRegions(
            min_gradient_norm=0.0, max_iterations=iterations, verbosity=0, theta=2.0, kappa=1e-6
        )
        point = optimizer.run(problem, initial_point=start).point
        norms.append(gradient_norm(space, problem, point))
    steps = [(a, b) for a, b in itertools.pairwise(norms) if 1e-5 < a < 0.1]
    assert steps
    assert all(b <= 10 * a**1.7 for a, b in steps)


def test_conjugate_gradients_solve_completion():
    space, problem, A, start = completion(40, 30, 3, 0.5, seed=5)
    optimizer = pymanopt.optimizers.ConjugateGradient(
        min_gradient_norm=1e-6, max_iterations=300, verbosity=0
    )
    result = optimizer.run(problem, initial_point=start)
    assert error(space, result.point, A) <= 1e-5


def test_steepest_descent_stays_in_the_well_conditioned_set():
    manifold = lrm.WellConditioned(12, 10, 3, tau=0.2)
    space, A = PackedFixedRank(manifold), gaussian(12, 10, seed=0)

    @pymanopt.function.pytorch(space)
    def cost(X):
        return 0.5 * (manifold.to_dense(X) - A).square().sum()

    problem = pymanopt.Problem(space, cost)
    optimizer = pymanopt.optimizers.SteepestDescent(max_iterations=30, verbosity=0)
    # of 40 starts one ends in a local minimum 7 % above the best
    torch.manual_seed(0)
    start = manifold.random(*manifold.point_shape, dtype=torch.float64)
    result = optimizer.run(problem, initial_point=start.detach().as_subclass(torch.Tensor).numpy())
    X = torch.from_numpy(result.point)
    assert float(manifold.cond(X)) <= 1.2 * (1 + 1e-10)
    best = (manifold.to_dense(manifold.from_dense(A)) - A).norm()
    assert float((manifold.to_dense(X) - A).norm()) <= 1.05 * float(best)


@given(shapes, seeds)
def test_gradient_and_hessian_are_the_derivatives_of_the_cost(shape, seed):
    space, problem, _, _ = completion(*shape, 0.6, seed=seed % 1000, noise=0.1)
    np.random.seed(seed % 1000)
    X = space.random_point()
    xi = space.random_tangent_vector(X)
    h = 1e-4 * float(space.manifold.svdvals(torch.from_numpy(X))[-1])
    ends = [space.exp(X, s * h * xi) for s in (-1, 1)]
    slope = (problem.cost(ends[1]) - problem.cost(ends[0])) / (2 * h)
    grad = problem.riemannian_gradient(X)
    assert slope == pytest.approx(space.inner_product(X, grad, xi), rel=1e-4, abs=1e-5)
    grads = [problem.riemannian_gradient(Y) for Y in ends]
    turned = [space.transport(Y, X, g) for Y, g in zip(ends, grads, strict=True)]
    change = (turned[1] - turned[0]) / (2 * h)
    hess = problem.riemannian_hessian(X, xi)
    scale = 1 + np.linalg.norm(hess)
    assert np.linalg.norm(change - hess) <= 1e-4 * scale


def test_a_manifold_with_probe_gradients_is_refused():
    with pytest.raises(ValueError, match="gradient='factors'"):
        PackedFixedRank(lrm.FixedRank(6, 5, 2, gradient="probe"))


def test_the_space_is_a_pymanopt_manifold():
    np.random.seed(0)
    space = PackedFixedRank(lrm.FixedRank(7, 6, 2))
    X, Y = space.random_point(), space.random_point()
    assert space.dim == 22
    assert X.shape == (15, 2)
    xi = space.random_tangent_vector(X)
    assert space.norm(X, xi) == pytest.approx(1.0)
    np.testing.assert_allclose(space.projection(X, xi), xi, atol=1e-14)
    np.testing.assert_array_equal(space.zero_vector(X), 0 * X)
    points = X, Y, space.retraction(X, space.zero_vector(X))
    dense = [space.manifold.to_dense(torch.from_numpy(Z)).numpy() for Z in points]
    np.testing.assert_allclose(dense[2], dense[0], atol=1e-12)
    assert space.dist(X, Y) == pytest.approx(np.linalg.norm(dense[0] - dense[1]))


# -- conversions


def pair(shape, seed):
    """Our manifold with a point (clustered singular values too) and pymanopt's manifold."""
    m, n, r = shape
    X = packed_point(m, n, r, (), 1.0 + seed % 3, seed)
    theirs = pymanopt.manifolds.FixedRankEmbedded(m, n, r)
    return lrm.FixedRank(m, n, r), X, theirs


@given(shapes, seeds)
def test_points_go_both_ways_and_stay_the_same_matrix(shape, seed):
    M, X, _ = pair(shape, seed)
    u, s, vt = point_to_pymanopt(M, X)
    assert (np.diff(s) <= 0).all()
    np.testing.assert_allclose(u.T @ u, np.eye(shape[2]), atol=1e-12)
    np.testing.assert_allclose((u * s) @ vt, M.to_dense(X).numpy(), atol=1e-12)
    back = point_from_pymanopt(M, (u, s, vt))
    torch.testing.assert_close(M.to_dense(back), M.to_dense(X))
    assert M.check_point_on_manifold(back)


@given(shapes, seeds)
def test_tangents_go_both_ways_and_agree_with_their_embedding(shape, seed):
    M, X, theirs = pair(shape, seed)
    xi = M.project_ambient(X, gaussian(*shape[:2], seed=seed + 9))
    point, vector = point_to_pymanopt(M, X), tangent_to_pymanopt(M, X, xi)
    U, S, V = theirs.embedding(point, vector)
    np.testing.assert_allclose(U @ S @ V.T, M.tangent_to_dense(X, xi).numpy(), atol=1e-11)
    assert theirs.norm(point, vector) == pytest.approx(float(xi.norm()))
    torch.testing.assert_close(tangent_from_pymanopt(M, X, vector), xi, rtol=1e-11, atol=1e-11)


@given(shapes, seeds)
def test_projections_of_an_ambient_matrix_agree(shape, seed):
    M, X, theirs = pair(shape, seed)
    Z = gaussian(*shape[:2], seed=seed + 9)
    theirs_vector = theirs.projection(point_to_pymanopt(M, X), Z.numpy())
    got = tangent_from_pymanopt(M, X, theirs_vector)
    torch.testing.assert_close(got, M.project_ambient(X, Z), rtol=1e-10, atol=1e-11)


def test_what_is_no_point_of_the_set_is_refused():
    M = lrm.WellConditioned(6, 5, 2, tau=0.5)
    point = point_to_pymanopt(M, M.random(dtype=torch.float64))
    u, s, vt = point
    assert M.check_point_on_manifold(point_from_pymanopt(M, point))
    wide = (u, np.array([2.0, 1.0]), vt)
    with pytest.raises(ValueError, match=r"WellConditioned.*cond\(S\) = 2 .*FixedRank\(6, 5, 2\)"):
        point_from_pymanopt(M, wide)
    X = M.projx(point_from_pymanopt(lrm.FixedRank(6, 5, 2), wide))
    torch.testing.assert_close(point_from_pymanopt(M, point_to_pymanopt(M, X)).norm(), X.norm())
    for wrong in ((2 * u, s, vt), (u, 0 * s, vt), (u, np.nan * s, vt)):
        with pytest.raises(ValueError, match="point must be on FixedRank"):
            point_from_pymanopt(lrm.FixedRank(6, 5, 2), wrong)
    single = tuple(a.astype(np.float32) for a in wide)
    assert point_from_pymanopt(lrm.FixedRank(6, 5, 2), single).dtype == torch.float64


def test_a_tangent_vector_at_another_point_is_refused():
    M = lrm.FixedRank(6, 5, 2)
    X, Y = M.random(dtype=torch.float64), M.random(dtype=torch.float64)
    vector = tangent_to_pymanopt(M, Y, M.project_ambient(Y, gaussian(6, 5, seed=1)))
    with pytest.raises(ValueError, match="vector must be tangent at X"):
        tangent_from_pymanopt(M, X, vector)


def test_converting_a_batch_is_refused():
    M = lrm.FixedRank(5, 4, 2)
    with pytest.raises(ValueError, match="batch"):
        point_to_pymanopt(M, M.random(3, *M.point_shape))


# -- the inverse retraction


@given(shapes, seeds, st.sampled_from([1e-2, 0.3]))
def test_the_inverse_of_the_orthographic_retraction_is_exact(shape, seed, t):
    m, n, r = shape
    M = lrm.FixedRank(m, n, r, retraction="orthographic")
    X = packed_point(m, n, r, (2,), 3.0, seed)
    xi = M.project_ambient(X, gaussian(2, m, n, seed=seed + 9))
    xi = xi * (t / 3.0 / torch.linalg.matrix_norm(xi, keepdim=True))
    got = M.inverse_retr(X, M.retr(X, xi))
    torch.testing.assert_close(got, xi, rtol=1e-10, atol=1e-12)


def test_the_inverse_retraction_does_not_depend_on_the_gauge_of_the_other_point():
    M = lrm.FixedRank(8, 6, 3)
    X, Y = (packed_point(8, 6, 3, (), 3.0, seed) for seed in (0, 9))
    U, S, V = M.unpack(Y)
    A, B = orthonormal(3, 3, seed=1), orthonormal(3, 3, seed=2)
    other = M.pack(U @ A, A.mT @ S @ B, V @ B)
    torch.testing.assert_close(M.inverse_retr(X, Y), M.inverse_retr(X, other))


def test_points_and_vectors_off_their_place_are_refused_on_the_way_there():
    M = lrm.FixedRank(6, 5, 2)
    X = M.random(dtype=torch.float64)
    with pytest.raises(ValueError, match="X must be on FixedRank, but factor U"):
        point_to_pymanopt(M, 2 * X)
    for xi, why in ((gaussian(13, 2, seed=1), "xi must be tangent at X"), (X[:5], "shape of X")):
        with pytest.raises(ValueError, match=why):
            tangent_to_pymanopt(M, X, xi)
    with pytest.raises(TypeError, match="xi must be a real floating point tensor"):
        tangent_to_pymanopt(M, X, np.zeros(M.point_shape))
    for dtype in (torch.float32, torch.bfloat16):  # to the rounding of what is stored
        low = X.to(dtype)
        xi = M.proju(X, gaussian(13, 2, seed=1)).to(dtype)
        assert len(tangent_to_pymanopt(M, low, xi)) == len(point_to_pymanopt(M, low)) == 3


def test_what_is_no_triple_of_real_arrays_is_named():
    M = lrm.FixedRank(6, 5, 2)
    X = M.random(dtype=torch.float64)
    u, s, vt = point_to_pymanopt(M, X)
    for wrong in ((u, s), 5, None):
        with pytest.raises(ValueError, match=r"point must be a triple \(u, s, vt\), got"):
            point_from_pymanopt(M, wrong)
        with pytest.raises(ValueError, match=r"vector must be a triple \(Up, M, Vp\), got"):
            tangent_from_pymanopt(M, X, wrong)
    with pytest.raises(TypeError, match="arrays of real numbers, got complex128"):
        point_from_pymanopt(M, (u + 1j * u, s, vt))
    u.flags.writeable = False  # torch warns of such arrays
    assert M.check_point_on_manifold(point_from_pymanopt(M, (u, s, vt)))


def test_a_start_in_float32_is_taken():
    manifold = lrm.FixedRank(6, 5, 2)
    space, A = PackedFixedRank(manifold), gaussian(6, 5, seed=0)

    @pymanopt.function.pytorch(space)
    def cost(X):
        return 0.5 * (manifold.to_dense(X) - A).square().sum()

    start = manifold.random(generator=torch.Generator().manual_seed(0))
    optimizer = pymanopt.optimizers.ConjugateGradient(max_iterations=50, verbosity=0)
    problem = pymanopt.Problem(space, cost)
    result = optimizer.run(problem, initial_point=start.as_subclass(Tensor).numpy())
    best = 0.5 * float(torch.linalg.svdvals(A)[2:].square().sum())
    assert float(result.cost) == pytest.approx(best, rel=1e-6)
