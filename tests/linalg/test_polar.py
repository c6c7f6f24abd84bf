"""Polar factors: nearest, equivariant, and the same from products alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import orthonormality, relative
from strategies import conditions, dtypes, gaussian, matrix, orthonormal, seeds, spectra, spectrum

from lrmanifold import linalg
from lrmanifold.linalg import _newton_schulz, _orthonormal

TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6}
sizes = st.sampled_from(((4, 1), (3, 3), (8, 5), (40, 12)))


def oracle(A):
    """U Vᵀ of the singular value decomposition in float64."""
    U, _, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    return U @ Vh


def tall(size, kind, cond, seed, dtype, batch=(2,)):
    n, r = size
    return matrix(spectrum(kind, r, cond, seed, batch), n, seed, n=r).to(dtype)


@given(sizes, spectra, st.sampled_from((1e0, 1e1, 1e3)), seeds, dtypes)
def test_polar_is_u_v_transposed_of_the_svd(size, kind, cond, seed, dtype):
    A = tall(size, kind, cond, seed, dtype)
    # the polar factor itself has condition number 1/σ_min (Higham 2008, theorem 8.9)
    assert relative(linalg.polar(A), oracle(A)) <= cond * TOLERANCE[dtype]


@given(sizes, spectra, conditions, seeds, dtypes)
def test_polar_is_orthonormal_for_every_condition_number_up_to_1e6(size, kind, cond, seed, dtype):
    A = tall(size, kind, cond, seed, dtype)
    assert orthonormality(linalg.polar(A)) <= TOLERANCE[dtype]


@given(sizes, conditions, seeds, st.floats(-8, 0))
def test_no_orthonormal_matrix_is_nearer_than_the_polar_factor(size, cond, seed, log_distance):
    A = tall(size, "random", cond, seed, torch.float64)
    Q = linalg.polar(A)
    noise = gaussian(*Q.shape, seed=seed + 9)
    rival = torch.linalg.qr(Q + 10**log_distance * noise).Q
    rival = rival * torch.sign((rival * Q).sum(-2, keepdim=True))
    best, other = ((A - X).square().sum((-2, -1)) for X in (Q, rival))
    assert bool((best <= other + 1e-12).all())


@given(sizes, st.sampled_from((1e0, 1e1, 1e3)), seeds)
def test_polar_commutes_with_rotations_on_both_sides(size, cond, seed):
    A = tall(size, "geometric", cond, seed, torch.float64)
    B, C = (
        orthonormal(size[0], size[0], seed=seed + 1),
        orthonormal(size[1], size[1], seed=seed + 2),
    )
    assert relative(linalg.polar(B @ A @ C), B @ linalg.polar(A) @ C) <= cond * 1e-12


@given(sizes, seeds, st.sampled_from((0.0, 1e-12, 1e-6, 1e-3, 0.1)), dtypes)
def test_products_only_path_near_orthonormal_matrices_agrees_with_the_svd(size, seed, far, dtype):
    Q = orthonormal(*size, seed=seed)
    A = (3.0 * (Q + far * gaussian(*size, seed=seed + 1) / size[0])).to(dtype)
    assert relative(linalg.polar(A), oracle(A)) <= TOLERANCE[dtype]
    assert orthonormality(linalg.polar(A)) <= 0.25 * TOLERANCE[dtype]


@given(sizes, spectra, st.sampled_from((None, 1e1, 1e3)), seeds, dtypes, st.booleans())
def test_the_second_factors_are_the_root_of_the_gram_matrix_and_its_inverse(
    size, kind, cond, seed, dtype, one
):
    if cond is None:  # near an orthonormal matrix up to scale, the case of small steps
        noise = gaussian(2, *size, seed=seed + 1) / size[0]
        A, cond = (3.0 * (orthonormal(*size, seed=seed) + 0.1 * noise)).to(dtype), 1.0
    else:
        A = tall(size, kind, cond, seed, dtype)
    A = A[0] if one else A
    Q, K = linalg.polar_with_root(A)
    same, H = linalg.polar_decomposition(A)
    wide, eigenvalues = A.double(), torch.linalg.eigvalsh(H.double())
    assert torch.equal(Q, linalg.polar(A))
    assert torch.equal(Q, same)
    assert relative(Q.double() @ H.double(), wide) <= cond * TOLERANCE[dtype]
    assert relative(H.double() @ H.double(), wide.mT @ wide) <= cond * TOLERANCE[dtype]
    assert relative(wide @ K.double(), Q.double()) <= cond * TOLERANCE[dtype]
    for root in (H, K):
        assert relative(root, root.mT) <= cond * TOLERANCE[dtype]
    assert float(eigenvalues.min()) >= -TOLERANCE[dtype] * float(eigenvalues.max())
    assert float(torch.linalg.eigvalsh(K.double()).min()) > 0


def test_a_batch_with_near_and_far_matrices_equals_its_elements():
    near = orthonormal(8, 3, seed=0)
    batch = torch.stack((near, near + gaussian(8, 3, seed=1), 5.0 * near))
    Q = linalg.polar(batch.reshape(3, 1, 8, 3))
    assert Q.shape == (3, 1, 8, 3)
    assert relative(Q[:, 0], torch.stack([linalg.polar(A) for A in batch])) <= 1e-14


@given(sizes, spectra, conditions, seeds, dtypes)
def test_path_of_accelerators_agrees_with_the_svd(size, kind, cond, seed, dtype):
    A = tall(size, kind, cond, seed, dtype)
    Q, R = _orthonormal._qr_unchecked(A)
    Q = Q @ _newton_schulz.polar_square(R)
    assert orthonormality(Q) <= TOLERANCE[dtype]
    if cond <= 1e3:
        assert relative(Q, oracle(A)) <= cond * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 5, 18, 64])
def test_newton_schulz_keeps_a_multiple_of_an_orthogonal_matrix(r, dtype):
    """With r = 3 equal singular values the unstabilised scaling maps all of them to 0."""
    Q = orthonormal(r, r, seed=r)
    assert relative(_newton_schulz.polar_square((0.3 * Q).to(dtype)), Q) <= TOLERANCE[dtype]


@given(st.sampled_from((2, 3, 8, 32)), spectra, st.sampled_from((1e2, 1e8, 1e12)), seeds)
def test_newton_schulz_is_orthogonal_for_every_condition_number(r, kind, cond, seed):
    """A dominant singular value, 1 after normalisation, must not lose its sign."""
    R = matrix(spectrum(kind, r, cond, seed), r, seed)
    Q = _newton_schulz.polar_square(R)
    assert orthonormality(Q) <= 1e-12
    H = Q.mT @ R
    assert relative(H, H.mT) <= 1e-12
    assert float(torch.linalg.eigvalsh(0.5 * (H + H.mT)).min()) > -1e-14


def test_values_below_the_resolution_come_out_small_instead_of_failing():
    s = torch.tensor([1.0, 0.5, 1e-12, 0.0], dtype=torch.float64)
    out = _newton_schulz.scaled_newton_schulz(torch.diag(s), lower=1e-3).diagonal()
    assert out[:2].tolist() == pytest.approx([1.0, 1.0], abs=1e-14)
    assert 0 <= float(out[2]) < 1e-6
    assert float(out[3]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_for_accelerators_tells_what_is_singular(dtype):
    """Two equal columns came back as columns of half the length; the rest of a batch is right."""
    torch.manual_seed(0)
    R = torch.stack((torch.ones(3, 3), torch.eye(3), torch.randn(3, 3))).to(dtype)
    Q = _newton_schulz.polar_square(R)
    assert Q.isfinite().flatten(1).all(1).tolist() == [False, True, True]
