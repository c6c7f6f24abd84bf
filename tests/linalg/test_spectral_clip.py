"""The projection onto cond <= 1 + tau against minimisation by brute force."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import relative
from scipy.optimize import minimize_scalar
from strategies import (
    cores,
    dtypes,
    gaussian,
    matrix,
    orthonormal,
    seeds,
    spectra,
    spectrum,
    taus,
)

from lrmanifold import linalg
from lrmanifold.linalg import _conditioning

centres = st.sampled_from(("metric", "mean"))
double = st.just(torch.float64)


def clip_distance(s, t: float, kappa: float) -> float:
    """Σ dist(s_i, [t, κ t])²."""
    return sum((float(x) - min(max(float(x), t), kappa * t)) ** 2 for x in s)


def brute_force_distance(s, kappa: float) -> float:
    """Squared distance of the vector `s` to {x : max x <= κ min x}: the best t, by brute force."""
    low, high = float(s.min()) / kappa, float(s.max())
    grid = torch.linspace(low, high, 400, dtype=torch.float64).tolist()
    best = min(grid, key=lambda t: clip_distance(s, t, kappa))
    step = (high - low) / 399
    found = minimize_scalar(
        lambda t: clip_distance(s, t, kappa),
        bounds=(max(best - step, 1e-300), best + step),
        method="bounded",
        options={"xatol": 1e-13 * high},
    )
    return min(float(found.fun), clip_distance(s, best, kappa))


def cond(S) -> float:
    s = torch.linalg.svdvals(S.double())
    return float((s[..., 0] / s[..., -1]).max()) if S.numel() else 1.0


@given(st.sampled_from((1, 2, 3, 8, 20)), spectra, st.sampled_from((1.5, 1e1, 1e6)), seeds, taus)
def test_distance_to_the_projection_is_the_smallest_there_is(r, kind, condition, seed, tau):
    s = spectrum(kind, r, condition, seed)
    S = matrix(s, r, seed)
    C = linalg.spectral_clip(S, tau)
    # by von Neumann's trace inequality the nearest matrix is as far as the nearest spectrum
    least = brute_force_distance(s, 1.0 + tau)
    assert cond(C) <= (1 + tau) * (1 + 1e-12)
    assert float((C - S).square().sum()) <= least * (1 + 1e-9) + 1e-24


@given(cores(dtypes=double), taus, seeds, st.floats(-6, 0))
def test_no_feasible_matrix_is_nearer_than_the_projection(core, tau, seed, log_distance):
    S, C = core.S, linalg.spectral_clip(core.S, tau)
    noise = gaussian(*S.shape, seed=seed) * torch.linalg.matrix_norm(C)[..., None, None]
    U, s, Vh = torch.linalg.svd(C + 10**log_distance * noise)
    low = s.mean(-1, keepdim=True) * 2 / (2 + tau)  # some band of ratio 1 + tau, not the best one
    rival = (U * s.clamp(low, (1 + tau) * low)[..., None, :]) @ Vh
    assert cond(rival) <= (1 + tau) * (1 + 1e-12)
    ours, theirs = (torch.linalg.matrix_norm(S - X) for X in (C, rival))
    assert bool((ours <= theirs * (1 + 1e-12)).all())


@given(cores(), taus)
def test_projection_onto_cond_at_most_kappa_is_feasible_and_idempotent(core, tau):
    C = linalg.spectral_clip(core.S, tau)
    eps = torch.finfo(C.dtype).eps
    # σ_min is only known up to eps σ_max
    assert cond(C) <= (1 + tau) * (1 + 40 * eps * C.shape[-1] * (1 + tau))
    assert relative(linalg.spectral_clip(C, tau), C) <= 60 * eps
    assert C.dtype == core.S.dtype


@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["one big", "one small", "geometric", "clustered"])
def test_large_float32_cores_keep_to_the_band_to_1e5_however_dominant_one_value_is(kind, tau):
    S = matrix(spectrum(kind, 150, 1e4, 1), 150, 1).float()
    assert cond(linalg.spectral_clip(S, tau)) <= (1 + tau) * (1 + 1e-5)


@given(cores(), taus)
def test_feasible_matrices_are_left_as_they_are_to_the_last_bit(core, tau):
    feasible = cond(core.S) <= (1 + tau) * (1 + 1e-7)
    assume(feasible)
    assert torch.equal(linalg.spectral_clip(core.S, tau), core.S)


def test_infeasible_matrices_of_a_batch_do_not_touch_the_feasible_ones():
    S = torch.stack([matrix(spectrum("random", 5, c, 0), 5, 0) for c in (1.05, 7.0, 1.01)])
    C = linalg.spectral_clip(S, 0.1)
    assert torch.equal(C[[0, 2]], S[[0, 2]])
    assert relative(C[1], linalg.spectral_clip(S[1], 0.1)) <= 1e-14


@given(cores(dtypes=double), taus, centres, seeds)
def test_clip_commutes_with_rotations_and_scaling(core, tau, centre, seed):
    assume(core.cond <= 1e4)
    r = core.S.shape[-1]
    A, B = orthonormal(r, r, seed=seed), orthonormal(r, r, seed=seed + 1)
    C = linalg.spectral_clip(core.S, tau, centre=centre)
    assert relative(linalg.spectral_clip(A @ core.S @ B, tau, centre=centre), A @ C @ B) <= 1e-10
    assert relative(linalg.spectral_clip(3.0 * core.S, tau, centre=centre), 3.0 * C) <= 1e-10


@given(cores(dtypes=double, conds=st.sampled_from((1e0, 1e1, 1e4))))
def test_tau_zero_is_the_mean_singular_value_times_the_polar_factor(core):
    U, s, Vh = torch.linalg.svd(core.S)
    expected = s.mean(-1)[..., None, None] * (U @ Vh)
    assert relative(linalg.spectral_clip(core.S, 0.0), expected) <= 1e-12


@given(st.integers(1, 12), taus, seeds)
def test_vector_projection_is_nonexpansive_and_its_residual_obtuse(r, tau, seed):
    """Onto a convex cone: ‖Px - Py‖ <= ‖x - y‖ and <x - Px, z - Px> <= 0 for z in the cone."""
    x, y = (gaussian(r, seed=seed + k).abs().sort(descending=True).values for k in (0, 1))
    Px, Py = (linalg.clip_values(v, tau) for v in (x, y))
    assert float((Px - Py).norm()) <= float((x - y).norm()) + 1e-14
    assert float((x - Px) @ (Py - Px)) <= 1e-14


# -- the published clamp


@given(cores(conds=st.sampled_from((1e0, 1e1, 1e3))), taus)
def test_mean_clamp_is_feasible(core, tau):
    C = linalg.spectral_clip(core.S, tau, centre="mean")
    eps = torch.finfo(C.dtype).eps
    slack = 20 * eps * len(C.mT) * max(1 + tau, core.cond)
    assert cond(C) <= (1 + tau) * (1 + slack)


def test_mean_clamp_moves_the_feasible_matrix_with_one_singular_value_1_plus_tau_and_the_rest_1():
    tau = 0.5
    s = torch.tensor([1 + tau, 1.0, 1.0, 1.0], dtype=torch.float64)
    mean, half = float(s.mean()), tau / (2 + tau)
    once = linalg.clip_values(s, tau, centre="mean")
    assert once.tolist() == pytest.approx([(1 + half) * mean, 1.0, 1.0, 1.0])
    assert torch.equal(linalg.clip_values(s, tau, centre="metric"), s)
    again = linalg.clip_values(once, tau, centre="mean")
    assert float((again - once).abs().max()) > 0.03  # not idempotent: no projection


def test_mean_clamp_repeated_drifts_into_a_smaller_cone():
    tau = 0.5
    s = torch.tensor([1 + tau, 1.0, 1.0, 1.0], dtype=torch.float64)
    for _ in range(200):
        s = linalg.clip_values(s, tau, centre="mean")
    half = tau / (2 + tau)
    assert float((s - s.mean()).abs().max()) <= half * float(s.mean()) * (1 + 1e-12)
    assert float(s[0] / s[-1]) < 1 + tau - 0.1


# -- the path of accelerators


@given(cores(conds=st.sampled_from((1e0, 1.05, 1e1, 1e4, 1e6))), taus, centres)
def test_path_of_accelerators_agrees_with_the_svd(core, tau, centre):
    C = _conditioning._clip_unchecked(core.S, tau, centre)
    S = core.S.double()
    U, s, Vh = torch.linalg.svd(S)
    clipped = linalg.clip_values(s, tau, centre=centre)
    expected = (U * clipped[..., None, :]) @ Vh
    eps = torch.finfo(C.dtype).eps
    # products in its own precision know the smallest singular direction only to eps cond(S)
    assert relative(C, expected) <= 20 * eps + eps * core.cond
    assert cond(C) <= (1 + tau) * (1 + 1e-5)


@given(st.sampled_from((2, 3, 8, 32)), seeds, dtypes, taus)
def test_path_of_accelerators_finds_the_threshold_of_any_spectrum(r, seed, dtype, tau):
    """Newton's method on f' must not cycle between its pieces, wherever the values lie."""
    weights = gaussian(40, r, seed=seed)
    s = torch.exp(2.0 * weights).sort(-1, descending=True).values
    S = torch.diag_embed(s / s[..., :1]).to(dtype)
    C = _conditioning._clip_unchecked(S, tau, "metric")
    expected = linalg.clip_values(S.double().diagonal(dim1=-2, dim2=-1), tau)
    # s spans up to e^12, in which the float64 of the Newton-Schulz signs is what limits it
    tolerance = 1e-5 if dtype == torch.float32 else 1e-7
    assert relative(C, torch.diag_embed(expected)) <= tolerance


# -- precision, edges, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("centre", ["metric", "mean"])
def test_half_precision_in_and_out_is_computed_in_float32(dtype, centre):
    S = matrix(spectrum("random", 6, 20.0, 0, (3,)), 6, 0).to(dtype)
    C = linalg.spectral_clip(S, 0.1, centre=centre)
    assert C.dtype == dtype
    assert torch.equal(C, linalg.spectral_clip(S.float(), 0.1, centre=centre).to(dtype))


@pytest.mark.parametrize("tau", [-0.1, math.nan, math.inf])
def test_impossible_tau_is_refused(tau):
    with pytest.raises(ValueError, match="tau must be a finite number >= 0, got"):
        linalg.spectral_clip(torch.eye(3), tau)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="centre must be 'metric' or 'mean', got 'median'"):
        linalg.spectral_clip(torch.eye(3), 0.1, centre="median")
    with pytest.raises(ValueError, match=r"S must be square, got shape \(3, 4\)"):
        linalg.spectral_clip(torch.ones(3, 4), 0.1)
    for r in (1, 2):
        with pytest.raises(ValueError, match="zero matrix"):
            linalg.spectral_clip(torch.stack((torch.eye(r), torch.zeros(r, r))), 0.1)
    with pytest.raises(ValueError, match="must be finite"):
        linalg.spectral_clip(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), 0.1)


def test_path_of_accelerators_reports_nan_as_nan_and_leaves_the_rest_of_the_batch():
    S = matrix(spectrum("random", 4, 9.0, 0, (3,)), 4, 0)
    S[1, 0, 0] = torch.nan
    C = _conditioning._clip_unchecked(S, 0.1, "metric")
    assert bool(C[1].isnan().all())
    assert relative(C[[0, 2]], linalg.spectral_clip(S[[0, 2]], 0.1)) <= 1e-10


@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("batch", [(), (2,)])
@given(r=st.sampled_from((2, 5, 30)), near=st.booleans(), centre=centres, seed=seeds)
def test_derivatives_forwards_and_backwards_are_those_of_differences(
    tau, batch, r, near, centre, seed
):
    S = gaussian(*batch, r, r, seed=seed)
    if near:
        S = orthonormal(*batch, r, r, seed=seed) + 0.1 / r * S
    D, h = gaussian(*batch, r, r, seed=seed + 1), 1e-6 / r

    def clip(S):
        return linalg.spectral_clip(S, tau, centre=centre)

    forwards = torch.func.jvp(clip, (S,), (D,))[1]
    backwards = torch.autograd.functional.vjp(clip, S, forwards)[1]
    assert float((backwards * D).sum()) == pytest.approx(float(forwards.square().sum()), rel=1e-6)
    slope, other = ((clip(S + k * D) - clip(S - k * D)) / (2 * k) for k in (h, 2 * h))
    assume(relative(slope, other) <= 1e-5)  # no kink nearby
    assert relative(forwards, slope) <= 1e-4


def test_a_feasible_core_of_a_batch_has_its_derivative():
    S = torch.stack((torch.eye(3).double(), gaussian(3, 3, seed=0))).requires_grad_()
    linalg.spectral_clip(S, 0.1).sum().backward()
    assert torch.equal(S.grad[0], torch.ones(3, 3))
    alone = S.detach()[1].requires_grad_()
    linalg.spectral_clip(alone, 0.1).sum().backward()
    assert relative(S.grad[1], alone.grad) <= 1e-12


def test_rank_one_cores_and_empty_batches_are_left_alone():
    assert torch.equal(linalg.spectral_clip(torch.tensor([[-3.0]]), 0.0), torch.tensor([[-3.0]]))
    assert linalg.spectral_clip(torch.zeros(0, 4, 4), 0.1).shape == (0, 4, 4)


@given(
    values=st.sampled_from(([1.0, 0.5, 0.0], [1.0, 1.0, 0.3, 0.0, 0.0], [1.0, 0.9, 1e-12], [3, 0])),
    log_tau=st.floats(0, 308),
    size=st.sampled_from((1e-3, 1.0, 1e3)),
)
def test_the_largest_bounds_still_give_the_nearest_spectrum(values, log_tau, size):
    """For kappa beyond 1/√eps rounding blurs the piece of t; its square may overflow."""
    tau = 10.0**log_tau
    s = size * torch.tensor(values, dtype=torch.float64)
    exact = [Fraction(float(x)) for x in s]
    kappa, r = Fraction(1.0 + tau), len(exact)
    if exact[0] > kappa * exact[-1]:
        pieces = [
            (kappa * sum(exact[:p]) + sum(exact[r - q :])) / (kappa**2 * p + q)
            for p in range(1, r) for q in range(1, r - p + 1)
        ]  # fmt: skip

        def distance(t):
            return sum((x - min(max(x, t), kappa * t)) ** 2 for x in exact)

        t = min(pieces, key=distance)
        expected = [float(min(max(x, t), kappa * t)) for x in exact]
    else:
        expected = s.tolist()
    for found in (linalg.clip_values(s, tau), linalg.clip_values(s[None], tau)[0]):
        assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=0.0)
    clipped = linalg.spectral_clip(torch.diag(s), tau)
    assert clipped.diagonal().tolist() == pytest.approx(expected, rel=1e-12, abs=0.0)
    low = float(linalg.clip_values(s, tau, centre="mean")[-1])
    assert low >= float(s.mean()) / (1.0 + tau)


def test_a_singular_core_has_a_nearest_matrix_of_full_rank():
    S = matrix(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), 3, 0)
    C = linalg.spectral_clip(S, 0.25)
    assert cond(C) <= 1.25 * (1 + 1e-12)
    t = (1.25 * 2.0 + 0.0) / (1.25**2 + 1)  # mathematics 5 with p = q = 1
    assert torch.linalg.svdvals(C).tolist() == pytest.approx([1.25 * t, 1.0, t], rel=1e-12)
