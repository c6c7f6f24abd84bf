"""The clip that remembers: the same results as without memory, and a proof that is never wrong."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, gaussian, matrix, seeds, spectrum

from lrmanifold import linalg

sizes = st.sampled_from((2, 3, 8, 23, 24, 60))
bands = st.sampled_from((1e-3, 0.1, 0.5, 2.0))
margins = st.sampled_from((0.0, 0.5, 0.9))


def true_cond(S: torch.Tensor) -> float:
    s = torch.linalg.svdvals(S.double())
    return float(s[0] / s[-1])


def start(r: int, cond: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return matrix(spectrum("random", r, cond, seed), r, seed).to(dtype)


@given(r=sizes, tau=bands, margin=margins, dtype=dtypes, seed=seeds, size=st.floats(1e-4, 0.3))
def test_results_are_those_of_the_clip_without_memory(r, tau, margin, dtype, seed, size):
    memory, S = linalg.ClipMemory(), start(r, 1 + 2 * tau, dtype, seed)
    drift = gaussian(r, r, seed=seed) / r**0.5
    for i in range(12):
        expected = linalg.spectral_clip(S, tau, margin=margin)
        found = memory.clip(S, tau, margin=margin)
        assert torch.equal(found, expected)
        step = drift + gaussian(r, r, seed=seed + i) / r**0.5
        S = found + (size * step * float(found.norm()) / r).to(dtype)


@given(r=sizes, tau=bands, dtype=dtypes, seed=seeds, inside=st.floats(0.0, 1.0))
def test_the_worst_directions_are_never_let_pass(r, tau, dtype, seed, inside):
    """Growing the largest value and shrinking the smallest: equality in Weyl's inequality."""
    core = start(r, 1 + inside * tau, dtype, seed)
    memory = linalg.ClipMemory()
    memory.clip(core, tau)
    U, s, Vh = torch.linalg.svd(core.double())
    slack = float((1 + tau) * s[-1] - s[0]) / (2 + tau)
    for up, down in ((1, 0), (0, 1), (0.5, 0.5), (0.7, 0.7)):
        for t in (0.5, 0.9, 0.999, 1.0, 1.001, 1.1, 1.5, 2.0):
            worst = up * U[:, :1] @ Vh[:1] - down * U[:, -1:] @ Vh[-1:]
            # And of full rank: as large in the 2-norm, √r times as large in Frobenius'.
            many = (U * torch.linspace(up, -down, r, dtype=torch.float64)) @ Vh
            for change in (worst, many, -many):
                S = (core.double() + t * slack * change).to(dtype)
                if memory.proves(S, tau):
                    assert true_cond(S) <= 1 + tau


@pytest.mark.parametrize("r", [24, 100])
def test_changes_of_full_rank_are_measured_in_the_spectral_norm(r):
    core, memory = start(r, 1.0, torch.float64, 0), linalg.ClipMemory()
    memory.clip(core, 0.5)
    Q = matrix(torch.ones(r, dtype=torch.float64), r, 1)
    slack = float(torch.linalg.matrix_norm(core, 2)) * 0.5 / 2.5
    assert memory.proves(core + 0.7 * slack * Q, 0.5)  # 0.7 √r in Frobenius' norm
    assert not memory.proves(core + 1.05 * slack * Q, 0.5)


@given(tau=bands, dtype=dtypes, seed=seeds)
def test_another_core_and_a_broken_one_are_not_taken_for_the_known_one(tau, dtype, seed):
    memory = linalg.ClipMemory()
    memory.clip(start(8, 1.0, dtype, seed), tau)
    other = start(8, 50.0, dtype, seed + 1)
    assert not memory.proves(other, tau)
    assert torch.equal(memory.clip(other, tau), linalg.spectral_clip(other, tau))
    assert not memory.proves(torch.full_like(other, torch.nan), tau)
    with pytest.raises(ValueError, match="S"):
        memory.clip(torch.full_like(other, torch.nan), tau)
    with pytest.raises(ValueError, match="zero"):
        memory.clip(torch.zeros_like(other), tau)
    smaller = start(5, 50.0, dtype, seed)
    assert torch.equal(memory.clip(smaller, tau), linalg.spectral_clip(smaller, tau))


@pytest.mark.parametrize("r", [10, 60])
def test_a_core_that_moves_little_is_decomposed_seldom(r):
    memory, S = linalg.ClipMemory(), start(r, 3.0, torch.float32, 0)
    svd, eigh, calls = torch.linalg.svd, torch.linalg.eigh, []

    def counted(decompose):
        return lambda *args, **options: calls.append(1) or decompose(*args, **options)

    with (
        mock.patch("torch.linalg.svd", counted(svd)),
        mock.patch("torch.linalg.eigh", counted(eigh)),
    ):
        for i in range(50):
            S = memory.clip(S, 0.5, margin=0.5)
            S = S + 1e-3 * gaussian(r, r, seed=i).float() * float(S.norm()) / r
    assert 1 <= len(calls) <= 10


def test_a_caller_may_write_over_the_result():
    memory, S = linalg.ClipMemory(), start(30, 2.0, torch.float64, 0)
    S = memory.clip(S, 0.5, margin=0.5)
    assert memory.proves(S, 0.5)
    S.mul_(torch.linspace(1.0, 9.0, 30, dtype=torch.float64))
    assert not memory.proves(S, 0.5)
    assert true_cond(memory.clip(S, 0.5)) <= 1.5 + 1e-12


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-20, 1.0, 3e18, 1e20])
@pytest.mark.parametrize("r", [4, 40])
def test_sizes_whose_squares_have_no_float32(r, size):
    memory, S = linalg.ClipMemory(), start(r, 2.5, torch.float32, 0) * size
    for i in range(6):
        S = memory.clip(S, 0.1, margin=0.5)
        assert true_cond(S) <= 1.1 * (1 + 1e-5)
        S = S + 0.3 * size * gaussian(r, r, seed=i).float() / r
    assert true_cond(linalg.spectral_clip(S, 0.1)) <= 1.1 * (1 + 1e-5)
