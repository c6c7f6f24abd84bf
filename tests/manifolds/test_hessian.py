"""The Riemannian Hessian in factored form against dense formulas and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SHAPES, gaussian, seeds

import lrmanifold as lrm

shapes = st.sampled_from([s for s in SHAPES if s[2] < min(s[:2])])


def test_gradients_of_probes_are_refused():
    M = lrm.FixedRank(7, 5, 3, gradient="probe")
    X = M.random().as_subclass(torch.Tensor)
    with pytest.raises(ValueError, match="gradient='factors', got 'probe'"):
        M.ehess2rhess(X, X, X, X)


def problem(m, n, r, seed):
    """A point, two tangent vectors, and a cost with a Hessian that couples all entries."""
    M = lrm.FixedRank(m, n, r)
    X = M.random(dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    X = X.as_subclass(torch.Tensor)
    A, B = gaussian(m, n, seed=seed + 1), gaussian(n, n, seed=seed + 2)

    def cost(W):
        return 0.5 * ((W - A) @ B).square().sum() + 0.1 * W.pow(3).sum()

    xi, eta = (M.project_ambient(X, gaussian(m, n, seed=seed + k)) for k in (3, 4))
    return M, X, cost, xi / xi.norm(), eta / eta.norm()


def hessian(M, X, cost, xi):
    """ehess2rhess from autograd's products with the packed tensor."""
    Y = X.clone().requires_grad_()
    (egrad,) = torch.autograd.grad(cost(M.to_dense(Y)), Y, create_graph=True)
    (ehess,) = torch.autograd.grad((egrad * M.lift(X, xi)).sum(), Y)
    return M.ehess2rhess(X, egrad.detach(), ehess, xi)


def dense_hessian(M, X, cost, xi):
    """P_W(∇²f[ξ]) plus the curvature blocks of Vandereycken 2013, with dense matrices."""
    W = M.to_dense(X).requires_grad_()
    (G,) = torch.autograd.grad(cost(W), W, create_graph=True)
    (H,) = torch.autograd.grad((G * M.tangent_to_dense(X, xi)).sum(), W)
    G, (U, S, V), (U_p, _, V_p) = G.detach(), M.unpack(X), M.unpack(xi)
    inverse = torch.linalg.inv(S)
    left, right = torch.eye(M.m).double() - U @ U.mT, torch.eye(M.n).double() - V @ V.mT
    curved = left @ G @ V_p @ inverse.mT @ V.mT + U @ (right @ G.mT @ U_p @ inverse).mT
    return M.project_ambient(X, H) + M.project_ambient(X, curved)


@given(shapes, seeds)
def test_hessian_is_the_dense_one(shape, seed):
    M, X, cost, xi, _ = problem(*shape, seed % 1000)
    want = dense_hessian(M, X, cost, xi)
    assert (hessian(M, X, cost, xi) - want).norm() <= 1e-8 * (1 + want.norm()) * M.cond(X)


@given(shapes, seeds)
def test_hessian_is_symmetric_and_tangent(shape, seed):
    M, X, cost, xi, eta = problem(*shape, seed % 1000)
    H_xi, H_eta = hessian(M, X, cost, xi), hessian(M, X, cost, eta)
    size = float((H_xi.norm() + H_eta.norm()) * M.cond(X))
    assert abs((H_xi * eta).sum() - (H_eta * xi).sum()) <= 1e-10 * (1 + size)
    ok, reason = M.check_vector_on_tangent(X, H_xi, explain=True, atol=1e-8 * (1 + size))
    assert ok, reason


def test_hessian_is_the_second_derivative_along_geodesics():
    for shape, seed in (((7, 5, 3), 0), ((5, 9, 2), 1), ((6, 6, 1), 2)):
        M, X, cost, xi, _ = problem(*shape, seed)
        t = 1e-3 * float(M.svdvals(X)[-1])
        values = [float(cost(M.to_dense(M.expmap(X, k * t * xi)))) for k in (-1, 0, 1)]
        measured = (values[0] - 2 * values[1] + values[2]) / t**2
        want = float((hessian(M, X, cost, xi) * xi).sum())
        assert abs(measured - want) <= 1e-4 * (1 + abs(want))


@given(st.sampled_from(SHAPES), seeds)
def test_lift_moves_the_matrix_along_the_vector(shape, seed):
    M, X, _, xi, _ = problem(*shape, seed % 1000)
    U, S, V = M.unpack(X)
    dU, dS, dV = M.unpack(M.lift(X, xi))
    moved = dU @ S @ V.mT + U @ dS @ V.mT + U @ S @ dV.mT
    assert (moved - M.tangent_to_dense(X, xi)).abs().max() <= 1e-12 * M.cond(X)
