"""(U A, AᵀS B, V B) with orthogonal A, B is the same matrix: no method may see the difference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import dense, dense_tangent, relative
from strategies import Point, batches, gaussian, orthonormal, points, seeds, shapes

import lrmanifold as lrm

double = st.just(torch.float64)


class Gauge:
    """One change of gauge, applied to points, and to tangent vectors at them."""

    def __init__(self, p: Point, seed: int) -> None:
        r, batch = p.manifold.rank, p.X.shape[:-2]
        self.manifold = p.manifold
        self.A = orthonormal(*batch, r, r, seed=seed + 50)
        self.B = orthonormal(*batch, r, r, seed=seed + 51)

    def point(self, X):
        """(U A, AᵀS B, V B)."""
        U, S, V = self.manifold.unpack(X)
        return self.manifold.pack(U @ self.A, self.A.mT @ S @ self.B, V @ self.B)

    def vector(self, xi):
        """(U_p B, AᵀM B, V_p A): the same dense vector at the changed point."""
        U_p, M, V_p = self.manifold.unpack(xi)
        return self.manifold.pack(U_p @ self.B, self.A.mT @ M @ self.B, V_p @ self.A)

    def gradient(self, G):
        """(g_U A, Aᵀg_S B, g_V B): what autograd returns at the changed point."""
        return self.point(G)


def test_the_gauge_changes_the_tensors_but_not_the_matrices():
    M = lrm.FixedRank(6, 5, 2)
    X = torch.Tensor(M.random(dtype=torch.float64))
    p = Point(M, X, M.proju(X, torch.randn_like(X)), 0)
    gauge = Gauge(p, 0)
    Y, eta = gauge.point(X), gauge.vector(p.xi)
    assert relative(Y, X) > 0.1
    assert relative(dense(Y, 6, 5), dense(X, 6, 5)) <= 1e-14
    assert relative(dense_tangent(Y, eta, 6, 5), dense_tangent(X, p.xi, 6, 5)) <= 1e-14


@pytest.mark.parametrize("name", lrm.retractions.available())
@given(p=points(dtypes=double), seed=seeds)
def test_every_retraction_gives_the_same_matrix(name, p, seed):
    M, gauge = p.manifold, Gauge(p, seed)
    retract = lrm.retractions.get(name)
    Y, Z = retract(M, p.X, p.xi), retract(M, gauge.point(p.X), gauge.vector(p.xi))
    assert relative(dense(Z, M.m, M.n), dense(Y, M.m, M.n)) <= 1e-9


@given(points(dtypes=double), seeds)
def test_gradient_is_the_same_dense_vector(p, seed):
    M, gauge = p.manifold, Gauge(p, seed)
    # a factor gradient of an actual function: it obeys the gauge identities
    W = p.X.clone().requires_grad_()
    (G,) = torch.autograd.grad(M.to_dense(W).sin().sum(), W)
    X, xi, eta = gauge.point(p.X), M.egrad2rgrad(p.X, G), None
    eta = M.egrad2rgrad(X, gauge.gradient(G))
    assert relative(eta, gauge.vector(xi)) <= 1e-9
    assert relative(dense_tangent(X, eta, M.m, M.n), dense_tangent(p.X, xi, M.m, M.n)) <= 1e-9


@given(points(dtypes=double), seeds)
def test_transport_depends_on_neither_gauge(p, seed):
    M, Y = p.manifold, p.another()
    here, there = Gauge(p, seed), Gauge(p, seed + 9)
    plain = dense_tangent(Y, M.transp(p.X, Y, p.xi), M.m, M.n)
    X, Z = here.point(p.X), there.point(Y)
    changed = dense_tangent(Z, M.transp(X, Z, here.vector(p.xi)), M.m, M.n)
    assert float((changed - plain).abs().max()) <= 1e-11


@given(points(dtypes=double), seeds)
def test_measurements_and_inverse_maps_are_the_same(p, seed):
    M, Y = p.manifold, p.another()
    here, there = Gauge(p, seed), Gauge(p, seed + 9)
    X, Z = here.point(p.X), there.point(Y)
    assert float((M.dist(X, Z) - M.dist(p.X, Y)).abs().max()) <= 1e-12
    assert float(M.dist(X, p.X).max()) <= 1e-12
    assert relative(M.svdvals(X)[..., None], M.svdvals(p.X)[..., None]) <= 1e-10
    assert relative(M.inverse_retr(X, Z), here.vector(M.inverse_retr(p.X, Y))) <= 1e-11
    noise = gaussian(*p.X.shape[:-2], M.m, M.n, seed=seed)
    assert (
        relative(M.project_ambient(X, noise), here.vector(M.project_ambient(p.X, noise))) <= 1e-11
    )


@given(points(dtypes=double, conds=st.just(10.0)), seeds)
def test_geodesic_and_projection_of_drifted_points_are_the_same(p, seed):
    M, gauge = p.manifold, Gauge(p, seed)
    step = 0.05 * p.xi
    Y, Z = M.expmap(p.X, step), M.expmap(gauge.point(p.X), gauge.vector(step))
    assert relative(dense(Z, M.m, M.n), dense(Y, M.m, M.n)) <= 1e-10
    drifted = p.X + 1e-2 * gaussian(*p.X.shape, seed=seed)
    Y, Z = M.projx(drifted), M.projx(gauge.point(drifted))
    assert relative(dense(Z, M.m, M.n), dense(Y, M.m, M.n)) <= 1e-10


@pytest.mark.parametrize("centre", ["metric", "mean"])
@given(shape=shapes, batch=batches, seed=seeds, tau=st.sampled_from((0.0, 0.1, 2.0)))
def test_the_well_conditioned_step_is_the_same(centre, shape, batch, seed, tau):
    m, n, r = shape
    M = lrm.WellConditioned(m, n, r, tau=tau, centre=centre)
    X = M.pack(
        orthonormal(*batch, m, r, seed=seed),
        gaussian(*batch, r, r, seed=seed + 1) + 3 * torch.eye(r, dtype=torch.float64),
        orthonormal(*batch, n, r, seed=seed + 2),
    )
    X = M.projx(X)
    p = Point(M, X, 0.1 * M.proju(X, gaussian(*X.shape, seed=seed + 3)), seed)
    gauge = Gauge(p, seed)
    Y, Z = M.retr(X, p.xi), M.retr(gauge.point(X), gauge.vector(p.xi))
    assert relative(dense(Z, m, n), dense(Y, m, n)) <= 1e-8
