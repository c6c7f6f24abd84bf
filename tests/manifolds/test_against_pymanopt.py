"""pymanopt's FixedRankEmbedded as an independent implementation (distinct singular values only).

Its points are (u, s, vᵀ) with a diagonal core and its gradient divides by differences of singular
values, so that spectra here are well separated; clustered ones are covered by dense oracles.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from oracles import dense, dense_tangent, relative
from strategies import gaussian, orthonormal

import lrmanifold as lrm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from pymanopt.manifolds import FixedRankEmbedded
    from pymanopt.manifolds.fixed_rank import _FixedRankPoint, _FixedRankTangentVector

SHAPES = [(7, 5, 3), (5, 9, 2), (6, 6, 1), (12, 10, 4)]


def both(m, n, r, seed):
    """The same point and tangent vector in both packages."""
    U, V = orthonormal(m, r, seed=seed), orthonormal(n, r, seed=seed + 1)
    s = torch.linspace(3.0, 1.0, r, dtype=torch.float64)
    M = lrm.FixedRank(m, n, r)
    X = M.pack(U, torch.diag(s), V)
    xi = 0.2 * M.proju(X, gaussian(*X.shape, seed=seed + 2))
    U_p, core, V_p = (block.numpy() for block in M.unpack(xi))
    theirs = FixedRankEmbedded(m, n, r)
    point = _FixedRankPoint(U.numpy(), s.numpy(), V.mT.numpy())
    return M, X, xi, theirs, point, _FixedRankTangentVector(U_p, core, V_p)


def as_dense(point) -> torch.Tensor:
    u, s, vt = point
    return torch.from_numpy((u * s) @ vt)


def as_dense_vector(manifold, point, vector) -> torch.Tensor:
    u, s, v = manifold.embedding(point, vector)
    return torch.from_numpy(u @ s @ v.T)


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_projection_inner_product_retraction_and_transport_agree(m, n, r, seed):
    M, X, xi, theirs, point, vector = both(m, n, r, seed)
    assert M.dim == theirs.dim
    assert relative(dense_tangent(X, xi, m, n), as_dense_vector(theirs, point, vector)) <= 1e-13
    assert float(M.norm(X, xi)) == pytest.approx(theirs.norm(point, vector), rel=1e-12)

    Z = gaussian(m, n, seed=seed + 3)
    projected = torch.from_numpy(np.concatenate(theirs.projection(point, Z.numpy())))
    assert relative(M.project_ambient(X, Z), projected) <= 1e-12

    Y, target = M.retr(X, xi), theirs.retraction(point, vector)
    assert relative(dense(Y, m, n), as_dense(target)) <= 1e-12

    moved = as_dense_vector(theirs, target, theirs.transport(point, target, vector))
    assert relative(dense_tangent(Y, M.transp(X, Y, xi), m, n), moved) <= 1e-11


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_gradient_agrees(m, n, r):
    """Theirs from the gradient in (u, s, vᵀ), ours from that in (U, S, V), of the same function."""
    M, X, _, theirs, point, _ = both(m, n, r, 5)
    weights = gaussian(m, n, seed=6)

    def f(W):
        return (weights * torch.sin(W)).sum()

    leaf = X.clone().requires_grad_()
    (packed,) = torch.autograd.grad(f(M.to_dense(leaf)), leaf)
    u, s, vt = (torch.from_numpy(np.array(x)).requires_grad_() for x in point)
    partials = torch.autograd.grad(f((u * s) @ vt), (u, s, vt))
    rgrad = theirs.euclidean_to_riemannian_gradient(point, tuple(g.numpy() for g in partials))
    expected = as_dense_vector(theirs, point, rgrad)
    assert relative(dense_tangent(X, M.egrad2rgrad(X, packed), m, n), expected) <= 1e-10
