"""Numbers near the ends of float32's range, and factors with very many rows."""

from __future__ import annotations

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor

import lrmanifold as lrm
from lrmanifold import linalg
from lrmanifold.optim import CondLR, CondLRAdam, CondLRMuon, force_accelerator

POWERS = st.sampled_from([-126, -100, -40, 0, 40, 100, 127])


def defect(Q: Tensor) -> float:
    """max |QᵀQ - I| in float64."""
    Q = Q.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=torch.float64)).abs().max())


@given(r=st.sampled_from([3, 30]), power=POWERS, tau=st.sampled_from([0.0, 0.1]), seed=seeds)
def test_cores_of_any_size_are_clipped_to_the_bound(r, power, tau, seed):
    torch.manual_seed(seed)
    S = torch.randn(r, r)
    S = S / S.abs().max() * 2.0**power  # at 127 σ_max is beyond the largest number
    C, exact = linalg.spectral_clip(S, tau).double(), linalg.spectral_clip(S.double(), tau)
    assert float((C - exact).norm()) <= 1e-4 * float(exact.norm())
    assert float(linalg.condition_number(C)) <= (1 + tau) * (1 + 1e-5)
    batch = linalg.spectral_clip(S[None], tau)[0].double()
    assert float(linalg.condition_number(batch)) <= (1 + tau) * (1 + 1e-5)
    assert float((batch - C).norm()) <= 1e-4 * float(C.norm())


@given(power=st.sampled_from([-60, -40, 0, 33, 60]), squared=st.booleans(), seed=seeds)
def test_the_penalty_and_its_gradient_scale_with_the_core(power, squared, seed):
    torch.manual_seed(seed)
    S = torch.randn(6, 6, dtype=torch.float64)
    degree = 4 if squared else 2
    exact = linalg.conditioning_penalty(S, squared=squared) * 2.0 ** (degree * power)
    slope = linalg.conditioning_penalty_grad(S, squared=squared) * 2.0 ** ((degree - 1) * power)
    small = (S * 2.0**power).float().requires_grad_()
    found = linalg.conditioning_penalty(small, squared=squared)
    if 2.0**-120 < float(exact) < 2.0**120:
        assert float(found) == pytest.approx(float(exact), rel=1e-5)
    closed = linalg.conditioning_penalty_grad(small.detach(), squared=squared).double()
    if float(slope.abs().min()) > 2.0**-120 and float(slope.abs().max()) < 2.0**120:
        assert float((closed - slope).norm()) <= 1e-5 * float(slope.norm())
        if torch.isfinite(found) and found > 0:
            found.backward()
            assert float((small.grad.double() - slope).norm()) <= 1e-5 * float(slope.norm())


def test_a_penalty_that_is_a_number_is_found_though_the_square_of_the_core_is_none():
    S = 2e19 * torch.diag(torch.tensor([1.0, 1.0625]))
    exact = float(linalg.conditioning_penalty(S.double()))
    assert float(linalg.conditioning_penalty(S)) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("tau", [1e39, 1e308])
def test_a_bound_beyond_the_largest_number_clips_one_spectrum_as_it_clips_a_batch(tau):
    for s in (torch.tensor([1.0, 0.5]), torch.tensor([3.0, 0.0])):
        assert torch.equal(linalg.clip_values(s, tau), linalg.clip_values(s[None], tau)[0])


@pytest.mark.parametrize("size", [5e-324, 1e-320, 1e-310, 1e-300, 1e300, 3.4e307])
def test_bounds_of_norms_near_the_ends_of_float64(size):
    A = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64) * size
    exact = 5.0 * size
    assert exact <= float(linalg.spectral_norm_bound(A)) <= exact * (1.0 + 1e-8) + 5e-324
    batch = torch.stack((A, torch.eye(2).double(), 0.0 * A))
    assert torch.equal(linalg.spectral_norm_bound(batch)[0], linalg.spectral_norm_bound(A))
    assert float(linalg.spectral_norm_bound(batch)[2]) == 0.0


def test_bounds_of_norms_beyond_the_largest_number_and_of_no_numbers_are_not_finite():
    largest = torch.finfo(torch.float64).max
    assert (
        float(linalg.spectral_norm_bound(torch.full((2, 2), largest, dtype=torch.float64)))
        == torch.inf
    )
    for bad in (torch.inf, torch.nan):
        A = torch.tensor([[1.0, bad], [0.0, 2.0]])
        assert not bool(linalg.spectral_norm_bound(A).isfinite())


@pytest.mark.parametrize("rows", [50_257, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [CondLR, CondLRAdam, CondLRMuon])
@pytest.mark.parametrize("forced", [False, True])
def test_drift_does_not_grow_with_rows_and_is_reported_as_it_is(rows, kind, forced):
    torch.manual_seed(0)
    M = lrm.WellConditioned(rows, 64, 8, tau=0.1)
    p = geoopt.ManifoldParameter(M.random().as_subclass(Tensor), manifold=M)
    optimizer = kind([p], lr=1e-3)
    for _ in range(2):
        p.grad = torch.randn_like(p) / rows**0.5
        if forced:
            with force_accelerator():
                optimizer.step()
        else:
            optimizer.step()
    U, _, V = M.unpack(p.detach())
    true = max(defect(U), defect(V))
    assert true <= 1e-6
    assert abs(float(M.drift(p.detach())) - true) <= 3e-7


def test_bases_of_many_rows_are_orthonormal():
    torch.manual_seed(0)
    A = torch.randn(200_000, 4)
    Q = linalg.polar(A)
    assert defect(Q) <= 1e-6
    assert defect(linalg.orthonormalize(A)) <= 1e-6
    assert float(lrm.Stiefel().drift(Q)) <= 1e-6


@pytest.mark.parametrize("power", [-100, 0, 100])
def test_norms_and_distances_of_any_size_are_those_of_the_dense_matrices(power):
    torch.manual_seed(0)
    M = lrm.FixedRank(7, 5, 3)
    X, Y = (M.random(2, *M.point_shape).as_subclass(Tensor) for _ in range(2))
    u = M.proju(X, torch.randn_like(X)) * 2.0**power
    for Z in (X, Y):
        M.unpack(Z).S.mul_(2.0**power)
    exact = torch.linalg.matrix_norm(u.double())
    assert torch.allclose(M.norm(X, u).double(), exact, rtol=1e-5, atol=0.0)
    assert torch.allclose(lrm.Stiefel().norm(X, u).double(), exact, rtol=1e-5, atol=0.0)
    exact = torch.linalg.matrix_norm(M.to_dense(X.double()) - M.to_dense(Y.double()))
    assert torch.allclose(M.dist(X, Y).double(), exact, rtol=1e-5, atol=0.0)
    if power >= 0:
        assert not M.check_vector_on_tangent(X, u + 2.0**power * X)


def test_singular_matrices_are_points_for_probe_gradients():
    W = torch.outer(torch.arange(1.0, 7.0), torch.ones(5))
    M = lrm.FixedRank(6, 5, 3, gradient="probe", retraction="bug")
    torch.testing.assert_close(M.to_dense(M.from_dense(W)), W, rtol=1e-5, atol=1e-5)
    assert M.check_point_on_manifold(M.from_dense(W), atol=1e-5)
    with pytest.raises(ValueError, match="W must have rank at least 3, got numerical rank 1"):
        lrm.FixedRank(6, 5, 3).from_dense(W)
