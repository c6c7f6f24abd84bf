"""Geodesics of the embedded fixed-rank metric: the equation they solve, and where they end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense, dense_tangent, project, relative
from strategies import batches, gaussian, orthonormal, packed_point, points, seeds

import lrmanifold as lrm
from lrmanifold.manifolds import _geodesic
from lrmanifold.manifolds._geodesic import geodesic

double = st.just(torch.float64)
FEWER = settings(max_examples=max(2, settings().max_examples // 4))  # many geodesics an example
mild = {"dtypes": double, "conds": st.sampled_from((1.0, 3.0))}


def curve(M, X, xi, times):
    """Dense points of the geodesic at the given times, shape (k, ..., m, n)."""
    return torch.stack([dense(M.expmap(X, t * xi), M.m, M.n) for t in times])


@given(points(**mild))
def test_geodesic_starts_at_the_point_with_the_given_velocity(p):
    M, h = p.manifold, 1e-4
    assert relative(dense(M.expmap(p.X, 0 * p.xi), M.m, M.n), dense(p.X, M.m, M.n)) <= 1e-13
    ahead, back = curve(M, p.X, p.xi, (h, -h))
    velocity = (ahead - back) / (2 * h)
    assert relative(velocity, dense_tangent(p.X, p.xi, M.m, M.n)) <= 1e-6


@given(points(**mild))
def test_acceleration_of_a_geodesic_is_normal_and_twice_u_p_s_inverse_v_p(p):
    """P_W(Ẅ) = 0 and Ẅ = 2 U_p S⁻¹ V_pᵀ (mathematics 3)."""
    M, h = p.manifold, 1e-3
    ahead, here, back = curve(M, p.X, p.xi, (h, 0.0, -h))
    acceleration = (ahead - 2 * here + back) / h**2
    U_p, _, V_p = M.unpack(p.xi)
    expected = 2 * U_p @ torch.linalg.inv(M.unpack(p.X).S) @ V_p.mT
    scale = float(p.xi.square().sum()) + 1e-3
    assert float((acceleration - expected).abs().max()) <= 1e-4 * scale
    tangential = project(p.X, acceleration, M.m, M.n)
    assert float(tangential.abs().max()) <= 1e-4 * scale


@FEWER
@given(points(**mild))
def test_a_geodesic_has_constant_speed(p):
    M, xi, h = p.manifold, 0.5 * p.xi, 1e-4
    speed = M.norm(p.X, xi)
    for t in (0.0, 0.5, 1.0):
        ahead, back = curve(M, p.X, xi, (t + h, t - h))
        measured = torch.linalg.matrix_norm(ahead - back) / (2 * h)
        assert float((measured / speed - 1).abs().max()) <= 1e-5


@FEWER
@given(points(**mild))
def test_a_geodesic_run_backwards_returns_to_its_start(p):
    """The arriving velocity, measured and projected, reversed, leads back to W."""
    M, xi, h = p.manifold, 0.3 * p.xi, 1e-3
    Y = M.expmap(p.X, xi)
    times = (1 + 2 * h, 1 + h, 1 - h, 1 - 2 * h)
    far, ahead, back, behind = curve(M, p.X, xi, times)
    arriving = (8 * (ahead - back) - (far - behind)) / (12 * h)  # fourth order
    home = M.expmap(Y, -M.project_ambient(Y, arriving))
    assert float(M.dist(home, p.X).max()) <= 1e-8


@FEWER
@given(points(**mild))
def test_half_way_twice_is_the_whole_way(p):
    """Exp is the flow of its own velocity: geodesics are determined by point and velocity."""
    M, xi, h = p.manifold, 0.3 * p.xi, 1e-3
    middle = M.expmap(p.X, 0.5 * xi)
    times = (0.5 + 2 * h, 0.5 + h, 0.5 - h, 0.5 - 2 * h)
    far, ahead, back, behind = curve(M, p.X, xi, times)
    velocity = M.project_ambient(middle, (8 * (ahead - back) - (far - behind)) / (12 * h))
    whole, halves = M.expmap(p.X, xi), M.expmap(middle, 0.5 * velocity)
    assert float(M.dist(whole, halves).max()) <= 1e-8


def test_the_end_of_a_geodesic_has_derivatives():
    M = lrm.FixedRank(5, 4, 2)
    X = packed_point(5, 4, 2, (), 3.0, 0)
    xi = 0.05 * M.proju(X, gaussian(*X.shape, seed=1))

    def end(u):
        return M.to_dense(M.expmap(X, M.proju(X, u)))

    assert torch.autograd.gradcheck(end, xi.requires_grad_(), fast_mode=True)


def test_at_full_rank_geodesics_are_straight_lines():
    M = lrm.FixedRank(4, 7, 4)
    X = M.pack(orthonormal(4, 4, seed=0), torch.eye(4).double(), orthonormal(7, 4, seed=1))
    xi = 0.2 * M.proju(X, gaussian(*X.shape, seed=2))
    straight = M.to_dense(X) + M.tangent_to_dense(X, xi)
    assert relative(M.to_dense(M.expmap(X, xi)), straight) <= 1e-12


def test_the_core_direction_is_a_straight_line_too():
    """U_p = V_p = 0 moves within matrices of the same row and column space, which is flat."""
    M = lrm.FixedRank(6, 5, 2)
    X = torch.Tensor(M.origin(dtype=torch.float64))
    xi = M.pack(torch.zeros(6, 2), gaussian(2, 2, seed=0, dtype=torch.float32), torch.zeros(5, 2))
    straight = M.to_dense(X) + 0.3 * M.tangent_to_dense(X, xi.double())
    assert relative(M.to_dense(M.expmap(X, 0.3 * xi.double())), straight) <= 1e-12


def test_rank_one_geodesics_agree_with_an_independent_integration():
    """W = s u vᵀ by scipy's Runge-Kutta on the dense second-order equation Ẅ = 2 U_p S⁻¹ V_pᵀ."""
    import numpy as np
    from scipy.integrate import solve_ivp

    M = lrm.FixedRank(4, 3, 1)
    X = M.pack(
        orthonormal(4, 1, seed=0), torch.full((1, 1), 2.0).double(), orthonormal(3, 1, seed=1)
    )
    xi = M.proju(X, gaussian(*X.shape, seed=2))

    def acceleration(_, state):
        W, dW = state.reshape(2, 4, 3)
        u, s, vh = np.linalg.svd(W)
        u, s, v = u[:, :1], s[0], vh[:1].T
        normal = dW @ v - u * (u.T @ dW @ v), dW.T @ u - v * (v.T @ dW.T @ u)
        return np.concatenate((dW.ravel(), (2 / s * normal[0] @ normal[1].T).ravel()))

    start = torch.stack((M.to_dense(X), M.tangent_to_dense(X, xi))).numpy().ravel()
    end = solve_ivp(acceleration, (0, 1), start, rtol=1e-11, atol=1e-12).y[:12, -1]
    assert np.abs(M.to_dense(M.expmap(X, xi)).numpy().ravel() - end).max() <= 1e-8


def test_a_geodesic_that_loses_rank_is_an_error_in_words():
    M = lrm.FixedRank(5, 4, 2)
    X = torch.Tensor(M.origin(dtype=torch.float64))
    xi = torch.zeros_like(X)
    M.unpack(xi).S[0, 0] = -1.0  # straight into rank 1 at time 1
    M.unpack(xi).U[2, 0] = 1e-3
    with pytest.raises(lrm.GeometryError, match="too near to a matrix of lower rank"):
        M.expmap(X, xi)


@given(st.sampled_from(((3, 3, 3), (6, 5, 2), (4, 7, 4))), st.floats(1.01, 5.0), seeds, batches)
@settings(max_examples=10)
def test_straight_geodesics_through_a_matrix_of_lower_rank_raise(shape, far, seed, batch):
    """With U_p = V_p = 0 the core goes straight on through det S = 0, at t = 1/far here."""
    m, n, r = shape
    M = lrm.FixedRank(m, n, r)
    X = packed_point(m, n, r, batch, 3.0, seed)
    P, s, Qh = torch.linalg.svd(M.unpack(X).S)
    gone = -far * P[..., -1:] @ (s[..., -1:, None] * Qh[..., -1:, :])
    xi = torch.zeros_like(X)
    M.unpack(xi).S.copy_(gone)
    with pytest.raises(lrm.GeometryError, match="loses rank: det S vanishes between the times"):
        M.expmap(X, xi)
    short = 0.9 / far * xi
    assert relative(M.to_dense(M.expmap(X, short)), dense(X + short, m, n)) <= 1e-12


def test_a_core_that_loses_two_singular_values_at_once_raises_though_det_s_keeps_its_sign():
    M = lrm.FixedRank(5, 4, 2)
    X = torch.Tensor(M.random(dtype=torch.float64))
    xi = torch.zeros_like(X)
    M.unpack(xi).S.copy_(-3.0 * M.unpack(X).S)
    with pytest.raises(lrm.GeometryError, match="lower rank"):
        geodesic(M.unpack(X), M.unpack(xi), max_steps=64)


def test_few_evaluations_reach_roundoff(monkeypatch):
    """RK4 took 2,032 to the same tolerance: the extrapolation is what makes geodesics cheap."""
    M, velocity, calls = lrm.FixedRank(20, 15, 5), _geodesic._velocity, []
    X = packed_point(20, 15, 5, (), 3.0, 0)
    xi = M.proju(X, gaussian(*X.shape, seed=1))
    xi = 0.5 * M.svdvals(X)[-1] * xi / M.norm(X, xi)
    monkeypatch.setattr(_geodesic, "_velocity", lambda s: calls.append(1) or velocity(s))
    M.expmap(X, xi)
    assert len(calls) <= 128


def test_a_run_with_too_few_steps_that_overflows_leaves_no_trace(monkeypatch):
    M = lrm.FixedRank(6, 5, 2)
    X = packed_point(6, 5, 2, (), 3.0, 0)
    xi = 0.3 * M.proju(X, gaussian(*X.shape, seed=1))
    expected, rule = M.to_dense(M.expmap(X, xi)), _geodesic._midpoint

    def overflowing(state, steps):
        end, cores = rule(state, steps)
        return (tuple(torch.nan * x for x in end), cores) if steps == 8 else (end, cores)

    monkeypatch.setattr(_geodesic, "_midpoint", overflowing)
    assert relative(M.to_dense(M.expmap(X, xi)), expected) <= 1e-13


def test_a_core_that_turns_half_around_keeps_its_rank():
    """det S > 0 all the way, eigenvalues (1 - 2t) ± it: the geodesic of full rank is a line."""
    M = lrm.FixedRank(2, 2, 2)
    X = torch.Tensor(M.origin(dtype=torch.float64))
    xi = torch.zeros_like(X)
    M.unpack(xi).S.copy_(torch.tensor([[-2.0, 1.0], [-1.0, -2.0]]))
    expected = torch.tensor([[-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    assert relative(M.to_dense(M.expmap(X, xi)), expected) <= 1e-13


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_low_precision_points_are_integrated_in_float64(dtype):
    M = lrm.FixedRank(6, 5, 2)
    X = torch.Tensor(M.random(dtype=torch.float32)).to(dtype)
    xi = 0.1 * M.proju(X, torch.randn_like(X))
    wide = [X.float().double(), xi.float().double()]
    Y = M.expmap(X, xi)
    assert Y.dtype == dtype
    tol = 1e-6 if dtype == torch.float32 else 2e-2
    assert relative(M.to_dense(Y.double()), M.to_dense(M.expmap(*wide))) <= tol


@pytest.mark.parametrize("cond", [1e2, 1e4, 1e6])
def test_ill_conditioned_points_have_geodesics_of_the_length_of_sigma_r(cond):
    """Their integration settles at eps cond(S), which is not a loss of rank."""
    M, count = lrm.FixedRank(12, 10, 4), 4
    X = packed_point(12, 10, 4, (count,), cond, 0)
    xi = M.proju(X, gaussian(*X.shape, seed=1))
    xi = xi / (2 * cond * M.norm(X, xi, keepdim=True))
    Y = M.expmap(X, xi)
    assert float(M.drift(Y).max()) <= 1e-13
    # a metric projection agrees up to third order; here ‖ξ‖ = σ_r/2 bounds the difference
    assert float((M.dist(Y, M.retr(X, xi)) * cond).max()) <= 0.1


def test_a_large_constant_direction_costs_the_others_no_accuracy():
    """Where the second singular pair moves alone, it does so as it would at rank 1."""
    two, one, big = lrm.FixedRank(8, 7, 2), lrm.FixedRank(8, 7, 1), 1e6
    P, Q = orthonormal(8, 3, seed=0), orthonormal(7, 3, seed=1)
    u, v, m = 0.8 * P[:, 2:], 0.6 * Q[:, 2:], torch.full((1, 1), 0.25, dtype=torch.float64)
    S, M = torch.diag(torch.tensor([big, 1.0])).double(), torch.diag(torch.tensor([0.0, 0.25]))
    X = two.pack(P[:, :2], S, Q[:, :2])
    xi = two.pack(torch.cat((0 * u, u), 1), M.double(), torch.cat((0 * v, v), 1))
    y = one.expmap(one.pack(P[:, 1:2], torch.ones_like(m), Q[:, 1:2]), one.pack(u, m, v))
    W = two.to_dense(two.expmap(X, xi)) - big * torch.outer(P[:, 0], Q[:, 0])
    assert float((W - one.to_dense(y)).abs().max()) <= 8 * torch.finfo(torch.float64).eps * big


@pytest.mark.parametrize(("size", "smallest"), [(1e12, 1.0), (1.0, 1e-12)])
def test_a_large_or_ill_conditioned_point_of_a_batch_costs_the_others_no_accuracy(size, smallest):
    M = lrm.FixedRank(7, 5, 3)
    X = packed_point(7, 5, 3, (2,), 3.0, 0)
    xi = M.proju(X, gaussian(*X.shape, seed=1))
    xi = xi * (M.svdvals(X)[..., -1] / M.norm(X, xi))[..., None, None]
    alone = M.to_dense(M.expmap(X[0], xi[0]))
    S = torch.diag(torch.tensor([1.0, 1.0, smallest], dtype=torch.float64))
    M.unpack(X[1]).S.copy_(size * S)
    xi[1] *= 1e-3 * size if smallest == 1.0 else 0.0
    assert relative(M.to_dense(M.expmap(X, xi)[0]), alone) <= 1e-12
