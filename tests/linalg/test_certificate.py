"""Certificates without a decomposition: never wrong, and tight enough to be of use."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, cores, dtypes, gaussian, matrix, seeds, spectra, spectrum, taus

import lrmanifold as lrm
from lrmanifold import linalg
from lrmanifold.linalg._certificate import certified, relative_defect


def true_cond(S: torch.Tensor) -> torch.Tensor:
    s = torch.linalg.svdvals(S.double())
    return s[..., 0] / s[..., -1]


# Near feasible, where a wrong skip could hide: spectra of every kind just within and beyond a band.
near = st.sampled_from((1.0, 1.0005, 1.001, 1.05, 1.0999, 1.1, 1.1001, 1.49, 1.5, 1.51, 3.0))


@given(cores(sizes=(1, 2, 3, 8, 30, 100), conds=near))
def test_the_bound_is_one(core):
    bound = linalg.condition_bound(core.S)
    assert bound.shape == core.S.shape[:-2]
    assert bool((bound >= true_cond(core.S)).all())


@given(core=cores(sizes=(1, 2, 3, 8, 30), conds=near), log_size=st.floats(-1, 1))
def test_the_bound_is_one_at_both_ends_of_the_range(core, log_size):
    """Squares under- and overflow beyond 1e±19 in float32, 1e±154 in float64."""
    power = round(log_size * (120 if core.S.dtype == torch.float32 else 1000))
    S = core.S / core.S.abs().amax((-2, -1), keepdim=True) * 2.0**power
    s = torch.linalg.svdvals(S.double() * 2.0**-power)
    bound = linalg.condition_bound(S)
    assert bool((bound >= s[..., 0] / s[..., -1]).all())
    assert bool((bound.isfinite() == linalg.condition_bound(S * 2.0**-power).isfinite()).all())


@given(cores(sizes=(2, 3, 8, 30, 100), conds=near), taus)
def test_what_is_certified_is_feasible(core, tau):
    E, _ = relative_defect(core.S)
    if certified(E, 1 + tau):
        assert bool((true_cond(core.S) <= 1 + tau).all())


@given(
    r=st.sampled_from((2, 5, 20, 60)),
    tau=st.sampled_from((1e-3, 0.1, 0.5)),
    dtype=dtypes,
    seed=seeds,
)
def test_no_direction_out_of_the_band_is_ever_skipped(r, tau, dtype, seed):
    """From the middle of the set along random and along the worst directions, step by step."""
    Q = matrix(torch.ones(r, dtype=torch.float64), r, seed)
    u, v = Q[:, :1], torch.eye(r, dtype=torch.float64)[:, :1]
    worst = u @ v.mT  # grows a single singular value: Frobenius' and the spectral norm agree
    for D in (worst, -worst, gaussian(r, r, seed=seed) / r**0.5, Q):
        for t in torch.linspace(0, 2 * tau, 15).tolist():
            S = (Q + t * D).to(dtype)
            E, _ = relative_defect(S)
            if certified(E, 1 + tau):
                assert float(true_cond(S)) <= 1 + tau


@pytest.mark.parametrize("r", [10, 50, 200])
def test_the_bound_is_within_the_stated_factor_of_the_defect(r):
    s = spectrum("random", r, 1.1, 0)
    S = matrix(s, r, 0)
    E, _ = relative_defect(S)
    exact = float(torch.linalg.matrix_norm(E, 2))
    bound = float(linalg.condition_bound(S)) ** 2
    e = (bound - 1) / (bound + 1)
    assert exact <= e <= exact * r ** (1 / 16) * (1 + 1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-5, 1e-3])
def test_powers_of_a_tiny_defect_do_not_underflow_to_a_proof(size):
    S = torch.diag(torch.tensor([1.0 + size, 1.0])).float()
    assert float(linalg.condition_bound(S)) >= float(true_cond(S))
    E, _ = relative_defect(S.double())
    assert not certified(E, 1 + 0.9 * size) or size < 1e-10


@pytest.mark.parametrize("values", [(1.0, 1.2, 2.0, 2.0), (1.0, 1.05, 1.1), (3.0, 1.0)])
def test_the_slope_of_the_bound_is_that_of_finite_differences(values):
    """Also where the first of the bounds proves nothing: its root has no derivative."""
    r = len(values)
    S = matrix(torch.tensor(values * 3, dtype=torch.float64).sort(descending=True)[0], 3 * r, 0)
    D = torch.randn(S.shape, dtype=S.dtype, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(linalg.condition_bound(S.requires_grad_()), S)
    with torch.no_grad():
        ends = [linalg.condition_bound(S + h * D) for h in (1e-6, -1e-6)]
    torch.testing.assert_close((slope * D).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("core", [torch.ones(1, 1), 2.0 * torch.eye(3), torch.ones(3, 3)])
def test_where_the_bound_has_no_slope_0_is_taken(core):
    S = core.clone().requires_grad_()
    linalg.condition_bound(S).backward()
    assert torch.equal(S.grad, torch.zeros_like(S))


def test_a_singular_core_is_not_bounded():
    S = torch.diag(torch.tensor([1.0, 0.0]))
    assert linalg.condition_bound(S).isinf()
    assert linalg.condition_bound(torch.full((3, 3), 0.5)).isinf()
    assert linalg.condition_bound(torch.zeros(3, 3)).isinf()


@given(kind=spectra, seed=seeds, tau=st.sampled_from((0.1, 0.5)), dtype=dtypes)
def test_a_certified_core_comes_back_itself_and_an_uncertified_one_projected(
    kind, seed, tau, dtype
):
    r = 40
    inside = matrix(spectrum(kind, r, 1 + 0.3 * tau, seed), r, seed).to(dtype)
    assert linalg.spectral_clip(inside, tau) is inside or torch.equal(
        linalg.spectral_clip(inside, tau), inside
    )
    outside = matrix(spectrum(kind, r, 1 + 1.5 * tau, seed), r, seed).to(dtype)
    clipped = linalg.spectral_clip(outside, tau)
    U, s, Vh = torch.linalg.svd(outside.double())
    expected = (U * linalg.clip_values(s, tau)) @ Vh
    assert oracles.relative(clipped, expected) <= 60 * torch.finfo(dtype).eps
    assert float(true_cond(clipped)) <= (1 + tau) * (1 + 1e-5)


@given(core=cores(sizes=(2, 5, 30), conds=near), tau=taus, margin=st.sampled_from((0.25, 0.5, 0.9)))
def test_a_margin_leaves_the_feasible_alone_and_brings_the_others_further_in(core, tau, margin):
    for S in core.S.reshape(-1, *core.S.shape[-2:]):
        found = linalg.spectral_clip(S, tau, margin=margin)
        if float(true_cond(S)) <= 1 + tau:
            assert torch.equal(found, S)
        elif float(true_cond(S)) > (1 + tau) * (1 + 1e-5):
            assert float(true_cond(found)) <= (1 + (1 - margin) * tau) * (1 + 1e-5)
            nearest = linalg.spectral_clip(S, (1 - margin) * tau)
            assert oracles.relative(found, nearest) <= 60 * torch.finfo(S.dtype).eps


def test_margins_out_of_range_raise():
    with pytest.raises(ValueError, match=r"margin must be in \[0, 1\), got 1.0"):
        linalg.spectral_clip(torch.eye(3), 0.1, margin=1.0)


@given(m=st.sampled_from((3, 90, 130, 200)), batch=batches, dtype=dtypes, seed=seeds)
def test_gram_matrices_by_blocks_are_those_of_one_product(m, batch, dtype, seed):
    for r in (1, 3, 97, 128, 130):
        if r <= m:
            A = gaussian(*batch, m, r, seed=seed, dtype=dtype)
            G = linalg.gram(A)
            assert oracles.relative(G, A.double().mT @ A.double()) <= 40 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rows", [8192, 8193, 50257, 200_000])
def test_gram_matrices_of_tall_float32_factors_do_not_lose_digits_with_rows(rows):
    """Plain sums are off by 4e-7 at 50,257 rows and 8e-6 at a million."""
    A = linalg.orthonormalize(gaussian(rows, 3, seed=0)).float()
    exact = A.double().mT @ A.double()
    assert float((linalg.gram(A).double() - exact).abs().max()) <= 1.5e-7
    assert float((linalg.gram(A[None]).double() - exact).abs().max()) <= 1.5e-7
    M = lrm.FixedRank(rows, 3, 3)
    U = 1.001 * A
    exact = U.double().mT @ U.double() - torch.eye(3)
    found = M.drift(M.pack(U, torch.eye(3), torch.eye(3)))
    assert abs(float(found) - float(exact.abs().max())) <= 1.5e-7


@given(
    size=st.sampled_from((0.0, 1e-9, 1e-5, 1e-3, 1e-2, 0.1, 0.5, 0.75)),
    r=st.sampled_from((1, 12, 100)),
    dtype=dtypes,
    batch=batches,
    seed=seeds,
)
def test_inverse_square_roots_near_the_identity(size, r, dtype, batch, seed):
    A = gaussian(*batch, r, r, seed=seed)
    E = A + A.mT
    E = (E * (size / torch.linalg.matrix_norm(E, 2, keepdim=True))).to(dtype)
    root = linalg.inverse_square_root(E, size).double()
    # root (I + E) root - I, by which bases drift, without sums near 1 and their rounding.
    D = root - torch.eye(r, dtype=torch.float64)
    F = D + E.double() + E.double() @ D
    assert float((F + D + D @ F).abs().max()) <= 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [0.8, float("nan")])
def test_inverse_square_roots_far_from_the_identity_raise(size):
    with pytest.raises(ValueError, match=f"size must be at most 0.75.*got {size}"):
        linalg.inverse_square_root(torch.zeros(3, 3), size)


@given(
    size=st.sampled_from((1e-3, 0.1, 0.4, 0.7, 2.0, 20.0)),
    r=st.sampled_from((1, 4, 60)),
    dtype=dtypes,
    seed=seeds,
)
def test_polar_factors_are_orthonormal_to_rounding_however_long_the_step(size, r, dtype, seed):
    U = linalg.orthonormalize(gaussian(80, r, seed=seed))
    D = gaussian(80, r, seed=seed + 1)
    D = D - U @ (U.mT @ D)
    Y = U + D * (size / torch.linalg.matrix_norm(D.mT @ D)) ** 0.5
    Q = linalg.polar(Y.to(dtype)).double()
    drift = (Q.mT @ Q - torch.eye(r, dtype=torch.float64)).abs().max()
    assert float(drift) <= 7 * torch.finfo(dtype).eps
