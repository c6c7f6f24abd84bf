"""Kernels for accelerators: what they answer is right, the rest is NaN for that matrix alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor

from lrmanifold import linalg
from lrmanifold.linalg import _products


def core(kind: str, r: int) -> Tensor:
    """With a spectrum that float32 products could get wrong, (r, r) in float64."""
    torch.manual_seed(r)
    U, V = (torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q for _ in range(2))
    s = {
        "clustered": 1 + 1e-3 * torch.rand(r),
        "one dominant value": torch.cat((torch.tensor([30.0]), 1 + 0.2 * torch.rand(r - 1))),
        "at the bound": torch.linspace(1.1, 1.0, r),
        "feasible": 1 + 0.05 * torch.rand(r),
        "far": torch.logspace(0, -2, r),
        "nearly singular": torch.logspace(0, -6, r),
    }[kind]
    return (U * s.double()) @ V.mT


@pytest.mark.parametrize("r", [1, 2, 5, 32, 102])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 2.0])
@pytest.mark.parametrize(
    "kind",
    ["clustered", "one dominant value", "at the bound", "feasible", "far", "nearly singular"],
)
def test_the_clip_by_products_is_the_projection(kind, tau, r):
    S = core(kind, r)
    found = linalg.clip_by_products(S.float()[None], tau)[0].double()
    exact = linalg.spectral_clip(S, tau)
    assert float(linalg.condition_number(found)) <= (1 + tau) * (1 + 1e-5)
    # Below 1e-6 of the norm float32 itself does not know the singular directions.
    tolerance = 1e-5 if kind != "nearly singular" else 5e-3
    assert float((found - exact).norm()) <= tolerance * float(exact.norm())


@given(
    r=st.sampled_from([5, 32, 64]),
    tau=st.sampled_from([0.1, 0.5]),
    inside=st.sampled_from([0.5, 0.9, 1.0, 1.1]),
    seed=seeds,
)
def test_the_clip_finds_the_threshold_near_the_set(r, tau, inside, seed):
    """Feasible cores stay to rounding: with one fine step of Newton's method they move by 3e-4."""
    torch.manual_seed(seed)
    s = 1 + inside * tau * torch.rand(r, dtype=torch.float64)
    S = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q * s
    found = linalg.clip_by_products(S.float()[None], tau)[0].double()
    exact = linalg.spectral_clip(S, tau)
    assert float((found - exact).norm()) <= 5e-6 * float(exact.norm())
    assert float(linalg.condition_number(found)) <= (1 + tau) * (1 + 1e-5)


@given(
    r=st.sampled_from([2, 3, 8, 32]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    digits=st.integers(1, 15),
    inside=st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e3]),
    seed=seeds,
)
def test_sets_with_hardly_an_inside_are_clipped_onto(r, dtype, digits, inside, seed):
    """Bounds as small as the roundings: every core of a batch, none is given up."""
    torch.manual_seed(seed)
    tau = 10.0**-digits
    s = 1 + inside * tau * torch.rand(20, 1, r, dtype=torch.float64)
    Q, P = (torch.linalg.qr(torch.randn(20, r, r, dtype=torch.float64)).Q for _ in range(2))
    S = ((Q * s) @ P).to(dtype)
    found = linalg.clip_by_products(S, tau).double()
    exact = linalg.spectral_clip(S.double(), tau)
    eps = torch.finfo(dtype).eps
    assert bool(found.isfinite().all())
    assert float((found - exact).norm() / exact.norm()) <= 20 * eps
    assert float(linalg.condition_number(found).max()) <= (1 + tau) * (1 + 32 * eps)


@given(r=st.sampled_from([2, 3, 8]), tau=st.sampled_from([3.0, 10.0, 30.0, 100.0, 1e3]), seed=seeds)
def test_a_threshold_that_is_not_found_is_told(r, tau, seed):
    """For large bounds Newton's method may stop too early: NaN then, never a wrong core."""
    torch.manual_seed(seed)
    s = torch.exp(2.0 * torch.randn(200, r, dtype=torch.float64)).sort(-1, descending=True).values
    S = torch.diag_embed(s / s[:, :1]).float()
    found = linalg.clip_by_products(S, tau).double()
    exact = torch.diag_embed(linalg.clip_values(S.double().diagonal(dim1=-2, dim2=-1), tau))
    there = found.isfinite().flatten(1).all(1)
    assert tau > 10 or float(there.double().mean()) >= 0.99
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert not there.any() or float(error[there].max()) <= 2e-4


def cores(s: Tensor) -> Tensor:
    """With these singular values (k, r) and bases at random, (k, r, r) in float64."""
    Q, P = (torch.linalg.qr(torch.randn(*s.shape, s.shape[-1], dtype=s.dtype)).Q for _ in range(2))
    return (Q * s[:, None]) @ P


def distances(found: Tensor, exact: Tensor) -> Tensor:
    """Of the cores that are no NaN, relative."""
    there = found.isfinite().flatten(1).all(1)
    return ((found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1))[there]


@given(
    r=st.sampled_from([4, 16, 64, 128]),
    tau=st.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0]),
    skew=st.sampled_from([1 / 3, 1.0, 3.0]),
    step=st.sampled_from([0.0, 3e-3, 3e-2, 0.3]),
    seed=seeds,
)
@settings(max_examples=40)
def test_cores_in_training_are_clipped(r, tau, skew, step, seed):
    """Many values at either bound, and a small step: the usual core, whatever the bound."""
    torch.manual_seed(seed)
    s = 0.5 + 3 * torch.rand(10, r, dtype=torch.float64) ** skew
    S = linalg.spectral_clip(cores(s), tau)
    size = tau * torch.linalg.matrix_norm(S, keepdim=True) / r
    S = (S + step * size * torch.randn_like(S)).float()
    found = linalg.clip_by_products(S, tau).double()
    error = distances(found, linalg.spectral_clip(S.double(), tau))
    assert len(error) >= (10 if tau < 10 else 8)
    assert float(error.max()) <= 1e-4


@given(r=st.sampled_from([4, 64]), tau=st.sampled_from([3.0, 30.0, 100.0]), seed=seeds)
def test_wide_bands_leave_feasible_cores_as_they_are(r, tau, seed):
    torch.manual_seed(seed)
    S = cores(1 + 0.3 * torch.rand(10, r, dtype=torch.float64)).float()
    error = distances(linalg.clip_by_products(S, tau), S)
    assert len(error) >= (10 if tau < 100 else 8)
    assert float(error.max()) <= 1e-5


@pytest.mark.parametrize("centre", ["metric", "mean"])
@pytest.mark.parametrize("tau", [0.1, 3.0])
@pytest.mark.parametrize("reach", [0.5, 0.95, 1.2])
def test_a_margin_moves_what_it_moves_on_the_cpu(reach, tau, centre):
    """A bound for cond knows few feasible cores of a wide band: they came back with cond 1.3."""
    torch.manual_seed(0)
    s = 1 + reach * tau * torch.rand(20, 8, dtype=torch.float64) ** 3
    s[:, :2] = torch.tensor([1.0, 1 + reach * tau])
    S, options = cores(s).float(), {"margin": 0.9}
    found = linalg.clip_by_products(S, tau, mean=centre == "mean", **options).double()
    exact = torch.stack(
        [linalg.spectral_clip(A, tau, centre=centre, **options) for A in S.double()]
    )
    error = distances(found, exact)
    assert len(error) == 20
    assert float(error.max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("small", [0.0, 1e-12, 1e-9, 6e-9])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.1, 3.0])
def test_singular_cores_are_told(tau, mean, small, dtype):
    """Their polar factor is not orthogonal, and the clip had cond up to infinity."""
    S = torch.stack((torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, 1.0, small])))).to(dtype)
    found = linalg.clip_by_products(S, tau, mean=mean)
    assert found.isfinite().flatten(1).all(1).tolist() == [True, False]


@given(
    tau=st.sampled_from([1e-6, 0.1, 3.0, 100.0]),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 3.0, 300.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds,
)
def test_cores_far_outside_of_a_fixed_band(tau, size, dtype, seed):
    torch.manual_seed(seed)
    low = 1 / (1 + tau)
    s = low + (1 - low) * torch.rand(10, 16, dtype=torch.float64)
    s[:, 0] *= size
    S, band = cores(s).to(dtype), (low, 1.0)
    found = linalg.clip_by_products(S, tau, band=band).double()
    U, s, Vh = linalg.svd(S.double())
    error = distances(found, (U * s.clamp(*band)[:, None]) @ Vh)
    assert len(error) >= (10 if size <= 1 else 0)
    assert not len(error) or float(error.max()) <= (2e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("size", [128, 250, 256])
def test_cores_on_which_lapack_gives_up(data_dir, size, tau):
    S = torch.load(data_dir / f"clustered_core_{size}.pt").detach()
    found = linalg.clip_by_products(S[None], tau)[0].double()
    exact = linalg.spectral_clip(S.double(), tau)
    assert float(linalg.condition_number(found)) <= (1 + tau) * (1 + 1e-5)
    assert float((found - exact).norm()) <= 1e-5 * float(exact.norm())


def test_padding_changes_no_clip():
    """A core continued by αI with a mask is clipped as it is without."""
    for tau in (0.0, 0.1):
        for mean in (False, True):
            S = core("far", 7).float()
            alpha = S.norm() / 7**0.5
            wide = torch.block_diag(S, alpha * torch.eye(4))[None]
            valid = (torch.arange(11) < 7).float()[None]
            padded = linalg.clip_by_products(wide, tau, mean=mean, valid=valid)[0, :7, :7]
            plain = linalg.clip_by_products(S[None], tau, mean=mean)[0]
            torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)


def test_what_products_cannot_answer_is_nan_for_that_core_alone():
    S = torch.stack((core("feasible", 5), torch.zeros(5, 5).double(), core("far", 5))).float()
    for tau in (0.0, 0.1):
        found = linalg.clip_by_products(S, tau)
        assert found.isfinite().flatten(1).all(1).tolist() == [True, False, True]


@given(size=st.sampled_from([1e-3, 0.1, 1.0, 3.0, 30.0]), r=st.sampled_from([1, 5, 40]), seed=seeds)
def test_pairs_of_polar_factors_are_orthonormal_and_exact(size, r, seed):
    torch.manual_seed(seed)
    Q = [linalg.orthonormalize(torch.randn(3, k, r, dtype=torch.float64)) for k in (60, 90)]
    Y = []
    for q in Q:
        w = torch.randn_like(q)
        w = w - q @ (q.mT @ w)
        Y.append(q + size * w / torch.linalg.matrix_norm(w, 2, keepdim=True))
    for found, y in zip(linalg.polar_pair(*(y.float() for y in Y)), Y, strict=True):
        P = found.double()
        there = P.isfinite().flatten(1).all(1)
        assert size > 3 or bool(there.all())  # longer steps may be refused, never be wrong
        P, y = P[there], y[there]
        if len(P):
            eye = torch.eye(r, dtype=torch.float64)
            assert float((P.mT @ P - eye).abs().max()) <= 1.5e-6
            U, _, Vh = torch.linalg.svd(y, full_matrices=False)
            assert float((P - U @ Vh).norm()) <= 1e-5 * (1 + size) * r**0.5


@pytest.mark.parametrize("size", [3.0, 10.0, 30.0])
@pytest.mark.parametrize(("n", "r"), [(60, 40), (200, 100)])
def test_long_steps_that_the_first_pass_misses_are_refused(size, n, r):
    """Their singular values differ much; one correction would leave a drift of 1e-4."""
    torch.manual_seed(0)
    q = linalg.orthonormalize(torch.randn(1, n, r, dtype=torch.float64))
    w = torch.randn_like(q)
    w = w - q @ (q.mT @ w)
    y = (q + size * w / torch.linalg.matrix_norm(w, 2, keepdim=True)).float()
    P = linalg.polar_pair(y, y)[0].double()
    assert not P.isfinite().all() or float((P.mT @ P - torch.eye(r)).abs().max()) <= 2e-6


@given(
    size=st.sampled_from([5.0, 10.0, 20.0, 50.0, 120.0, 200.0]),
    sizes=st.sampled_from([(20, 5), (120, 60)]),
    spread=st.sampled_from([0.0, 3.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds,
)
def test_long_steps_turn_no_frame(size, sizes, spread, dtype, seed):
    """Orthonormal is not enough: the first pass leaves a frame of the right span, but turned."""
    torch.manual_seed(seed)
    n, r = sizes
    q = linalg.orthonormalize(torch.randn(8, n, r, dtype=torch.float64))
    w = torch.randn_like(q) * torch.logspace(0, -spread, r, dtype=torch.float64)
    w = w - q @ (q.mT @ w)
    y = (q + size * w / torch.linalg.matrix_norm(w, 2, keepdim=True)).to(dtype)
    P = linalg.polar_pair(y, y)[0].double()
    U, _, Vh = linalg.svd(y.double())
    error = distances(P, U @ Vh) * r**0.5
    assert not len(error) or float(error.max()) <= (5e-4 if dtype == torch.float32 else 5e-7)


def test_constants_made_in_inference_mode_serve_in_training():
    _products.identity.cache_clear()
    _products.constant.cache_clear()
    S = torch.randn(2, 5, 5)
    with torch.inference_mode():
        linalg.clip_by_products(S, 0.1)
    linalg.clip_by_products(S.requires_grad_(), 0.1).sum().backward()
    assert bool(S.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_damped_polar_factors_of_halves_are_computed_in_float32(dtype):
    X = (torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) / 20).to(dtype)
    exact = linalg.damped_polar_by_products(X.float(), 0.1).to(dtype)
    assert torch.equal(linalg.damped_polar_by_products(X, 0.1), exact)
