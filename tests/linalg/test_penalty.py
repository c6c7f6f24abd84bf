"""The regulariser of RobustDLRT, its gradient in closed form, and what it bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import relative
from strategies import cores, gaussian, matrix, orthonormal, seeds, spectrum

from lrmanifold.linalg import (
    condition_number,
    conditioning_penalty,
    conditioning_penalty_grad,
    spectral_clip,
)

double = st.just(torch.float64)
moderate = st.sampled_from((1.5, 1e1, 1e3))


def defect(S):
    """SᵀS - (‖S‖²/r) I by its definition."""
    r = S.shape[-1]
    alpha2 = S.square().sum((-2, -1)) / r
    return S.mT @ S - alpha2[..., None, None] * torch.eye(r, dtype=S.dtype)


@given(cores(dtypes=double))
def test_penalty_is_the_norm_of_the_defect_and_sqrt_r_times_the_deviation_of_the_squares(core):
    R = conditioning_penalty(core.S)
    size = core.S.square().sum((-2, -1))
    squares = torch.linalg.svdvals(core.S).square()
    deviation = (squares - squares.mean(-1, keepdim=True)).norm(dim=-1)
    assert bool((R - torch.linalg.matrix_norm(defect(core.S))).abs().le(1e-12 * size).all())
    assert bool((R - deviation).abs().le(1e-12 * size).all())
    assert R.shape == core.S.shape[:-2]


@given(cores(dtypes=double, conds=moderate, sizes=(2, 3, 8)), st.booleans())
def test_closed_form_gradient_is_that_of_autograd(core, squared):
    S = core.S.requires_grad_()
    (grad,) = torch.autograd.grad(conditioning_penalty(S, squared=squared).sum(), S)
    assert relative(conditioning_penalty_grad(S, squared=squared), grad) <= 1e-9


@given(seeds, st.booleans())
def test_gradient_is_that_of_finite_differences(seed, squared):
    S, Z, h = gaussian(5, 5, seed=seed), gaussian(5, 5, seed=seed + 1), 1e-6
    ends = [conditioning_penalty(S + t * Z, squared=squared) for t in (h, -h)]
    slope = float(ends[0] - ends[1]) / (2 * h)
    grad = conditioning_penalty_grad(S, squared=squared)
    assert float((grad * Z).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("squared", [False, True])
def test_gradcheck(squared):
    S = gaussian(2, 4, 4, seed=0).requires_grad_()
    assert torch.autograd.gradcheck(lambda S: conditioning_penalty(S, squared=squared), S)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("squared", [False, True])
def test_at_multiples_of_orthogonal_matrices_the_subgradient_zero_is_taken(dtype, squared):
    S = torch.stack((2.0 * torch.eye(4), torch.eye(4), 0.5 * torch.eye(4).flip(0))).to(dtype)
    S.requires_grad_()
    R = conditioning_penalty(S, squared=squared)
    (grad,) = torch.autograd.grad(R.sum(), S)
    assert float(R.detach().abs().max()) == 0.0
    assert float(grad.abs().max()) == 0.0
    # a rotated multiple has the roundoff of SᵀS: its direction is noise and must not be a gradient
    rotated = (3.0 * orthonormal(4, 4, seed=0)).to(dtype)
    assert float(conditioning_penalty_grad(rotated, squared=squared).abs().max()) <= 1e-4
    assert float(conditioning_penalty_grad(rotated).abs().max()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("r", [2, 3, 4, 16])
def test_cores_clipped_to_condition_number_one_have_no_gradient(r, dtype):
    torch.manual_seed(0)
    S = torch.linalg.qr(torch.randn(2000, r, r, dtype=dtype))[0]
    for spread in (0.03, 1.0):
        C = spectral_clip(S + spread * torch.randn_like(S), 0.0)
        assert float(conditioning_penalty_grad(C).abs().max()) == 0.0


@given(cores(dtypes=double))
def test_gradient_is_at_most_twice_the_spectral_norm(core):
    size = torch.linalg.matrix_norm(conditioning_penalty_grad(core.S))
    assert bool((size <= 2 * torch.linalg.matrix_norm(core.S, ord=2) * (1 + 1e-12)).all())


@given(cores(dtypes=double, conds=moderate))
def test_penalty_bounds_the_condition_number(core):
    """ln cond <= R/(√2 σ_r²), and the scale-free bound, of which neither dominates."""
    s = torch.linalg.svdvals(core.S)
    r, R, kappa = s.shape[-1], conditioning_penalty(core.S), s[..., 0] / s[..., -1]
    assert bool((kappa.log() <= R / (math.sqrt(2) * s[..., -1] ** 2) + 1e-9).all())
    rho = R / s.square().mean(-1) * math.sqrt((r - 1) / r)
    bound = ((1 + rho) / (1 - rho)).sqrt()
    assert bool(((rho >= 1) | (kappa <= bound * (1 + 1e-9))).all())


@given(cores(dtypes=double, conds=moderate, sizes=(2, 5, 20)))
def test_a_small_step_down_the_gradient_improves_the_conditioning_penalty(core):
    S, R = core.S, conditioning_penalty(core.S)
    grad = conditioning_penalty_grad(S)
    step = 1e-4 * R / grad.square().sum((-2, -1)).clamp_min(1e-300)
    assert bool((conditioning_penalty(S - step[..., None, None] * grad) <= R).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("squared", [False, True])
def test_non_finite_input_is_reported_as_nan(bad, squared):
    S = torch.stack((torch.eye(3), torch.eye(3)))
    S[1, 0, 1] = bad
    R, grad = (
        conditioning_penalty(S, squared=squared),
        conditioning_penalty_grad(S, squared=squared),
    )
    assert not bool(R[1].isfinite())
    assert not bool(grad[1].isfinite().all())
    assert float(R[0]) == 0.0
    assert bool(grad[0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    S = gaussian(3, 6, 6, seed=0, dtype=dtype)
    for function in (conditioning_penalty, conditioning_penalty_grad):
        assert function(S).dtype == dtype
        assert torch.equal(function(S), function(S.float()).to(dtype))
    assert condition_number(S).dtype == torch.float32


@given(cores(dtypes=double))
def test_condition_number_is_the_quotient_of_the_extreme_singular_values(core):
    expected = torch.full(core.S.shape[:-2], core.cond if core.S.shape[-1] > 1 else 1.0).double()
    assert bool((condition_number(core.S) / expected - 1).abs().le(1e-8).all())


def test_condition_number_of_a_singular_matrix_is_infinite():
    assert float(condition_number(torch.diag(torch.tensor([1.0, 0.0])))) == math.inf


@pytest.mark.parametrize("function", [conditioning_penalty, conditioning_penalty_grad])
def test_rectangular_input_is_refused(function):
    with pytest.raises(ValueError, match=r"S must be square, got shape \(2, 3\)"):
        function(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"S must be a real floating point tensor, got .*complex64"):
        function(torch.ones(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="S must be a tensor, got None"):
        function(None)


def test_one_value_has_no_penalty():
    S = matrix(spectrum("random", 1, 1.0, 0, (4,)), 1, 0)
    assert float(conditioning_penalty(S).abs().max()) <= 1e-16
