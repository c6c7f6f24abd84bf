"""Orthonormal bases: Cholesky-QR with its fallback, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import orthonormality, relative
from strategies import batches, conditions, dtypes, gaussian, matrix, seeds, spectra, spectrum

from lrmanifold import linalg
from lrmanifold.linalg import _orthonormal

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
tall_shapes = st.sampled_from(((1, 1), (4, 1), (5, 5), (20, 7), (60, 20)))


@st.composite
def tall(draw, conds=conditions):
    """A batch of tall matrices with prescribed condition number, at any scale."""
    (n, r), batch, seed = draw(tall_shapes), draw(batches), draw(seeds)
    s = spectrum(draw(spectra), r, draw(conds), seed, batch)
    scale = draw(st.sampled_from((1.0, 1e-20, 1e18)))
    return (scale * matrix(s, n, seed, n=r)).to(draw(dtypes))


@given(tall())
def test_basis_is_orthonormal_for_every_condition_number_up_to_1e6(A):
    assert orthonormality(linalg.orthonormalize(A)) <= TOLERANCE[A.dtype]


@given(tall())
def test_basis_spans_the_columns_and_r_is_upper_triangular_with_positive_diagonal(A):
    Q, R = linalg.qr(A)
    assert relative(Q.double() @ R.double(), A) <= 4 * TOLERANCE[A.dtype]
    assert bool((R.diagonal(dim1=-2, dim2=-1) > 0).all())
    assert torch.equal(R, R.triu())
    assert Q.dtype == R.dtype == A.dtype


@given(tall())
def test_unchecked_path_of_accelerators_gives_the_same_basis(A):
    Q, R = _orthonormal._qr_unchecked(A)
    assert orthonormality(Q) <= TOLERANCE[A.dtype]
    assert relative(Q.double() @ R.double(), A) <= 4 * TOLERANCE[A.dtype]


@given(tall(conds=st.just(1e1)))
def test_well_conditioned_matrices_have_the_q_of_lapack_with_positive_diagonal(A):
    Q, R = torch.linalg.qr(A.double())
    Q = Q * torch.sign(R.diagonal(dim1=-2, dim2=-1))[..., None, :]
    assert relative(linalg.orthonormalize(A), Q) <= 100 * TOLERANCE[A.dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_only_the_ill_conditioned_matrices_of_a_batch_fall_back(monkeypatch, dtype):
    cond = {torch.float64: 1e12, torch.float32: 1e5}[dtype]
    s = torch.stack([spectrum("geometric", 4, c, 0) for c in (2.0, cond, 2.0)])
    A = matrix(s, 9, 0, n=4).to(dtype)
    # a fallback that answers NaN shows which matrices it is asked for, and that it is selected,
    # never blended
    monkeypatch.setattr(
        _orthonormal, "_householder", lambda A: (A * torch.nan, A[..., :4, :] + torch.eye(4))
    )
    Q = linalg.orthonormalize(A)
    assert bool(Q[1].isnan().all())
    assert orthonormality(Q[[0, 2]]) <= TOLERANCE[dtype]


def test_fallback_makes_the_ill_conditioned_matrix_orthonormal_too():
    s = torch.stack([spectrum("geometric", 4, c, 0) for c in (2.0, 1e6, 2.0)])
    assert orthonormality(linalg.orthonormalize(matrix(s, 9, 0, n=4).float())) <= 1e-6


def _deficient(kind: str, n: int, r: int, dtype: torch.dtype) -> torch.Tensor:
    A = gaussian(n, r, seed=1, dtype=dtype)
    if kind == "product":
        return gaussian(n, r - 1, seed=2, dtype=dtype) @ gaussian(r - 1, r, seed=3, dtype=dtype)
    A[:, -1] = A[:, 0] if kind == "equal columns" else 0.0
    return A


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(6, 2), (20, 5), (30, 30), (300, 40)])
@pytest.mark.parametrize("kind", ["product", "equal columns", "zero column"])
@pytest.mark.parametrize("function", [linalg.orthonormalize, linalg.polar])
def test_rank_deficient_input_raises(function, kind, shape, dtype):
    A = _deficient(kind, *shape, dtype)
    with pytest.raises(ValueError, match="full column rank"):
        function(torch.stack((gaussian(*shape, seed=5, dtype=dtype), A)))


def test_rank_deficient_input_is_completed_on_request():
    A = _deficient("product", 12, 4, torch.float64)
    Q, R = linalg.qr(A, rank_deficient=True)
    assert orthonormality(Q) <= 1e-14
    assert relative(Q @ R, A) <= 1e-14
    wide = gaussian(3, 5, seed=0)
    Q, R = linalg.qr(wide, rank_deficient=True)
    assert Q.shape == (3, 3)
    assert R.shape == (3, 5)
    assert relative(Q @ R, wide) <= 1e-14


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "function", [linalg.orthonormalize, linalg.polar, linalg.svd, linalg.svdvals]
)
def test_nan_and_inf_raise(function, bad):
    A = gaussian(2, 6, 3, seed=0)
    A[1, 2, 1] = bad
    with pytest.raises(ValueError, match="must be finite"):
        function(A)


@pytest.mark.parametrize("function", [linalg.orthonormalize, linalg.polar])
def test_wrong_arguments_are_named(function):
    with pytest.raises(ValueError, match=r"at least as many rows as columns, got shape \(3, 5\)"):
        function(torch.ones(3, 5))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        function(torch.ones(3))
    with pytest.raises(TypeError, match="floating point"):
        function(torch.ones(5, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"all-zero|full column rank"):
        function(torch.zeros(5, 3))


def test_unchecked_path_reports_nan_and_zero_as_nan_and_leaves_the_rest_of_the_batch():
    A = gaussian(3, 6, 2, seed=0)
    A[0, 0, 0] = torch.nan
    A[1] = 0.0
    Q, _ = _orthonormal._qr_unchecked(A)
    assert bool(Q[:2].isnan().all())
    assert torch.equal(Q[2], _orthonormal._qr_unchecked(A[2:])[0][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [linalg.orthonormalize, linalg.polar])
def test_half_precision_is_computed_in_float32(function, dtype):
    A = gaussian(3, 40, 6, seed=0, dtype=dtype)
    Q = function(A)
    assert Q.dtype == dtype
    assert torch.equal(Q, function(A.float()).to(dtype))


@pytest.mark.parametrize("function", [linalg.orthonormalize, linalg.polar])
def test_empty_batches_and_strided_input(function):
    assert function(torch.zeros(0, 5, 3)).shape == (0, 5, 3)
    A = gaussian(2, 7, 3, seed=0)
    strided = A.mT.contiguous().mT
    assert not strided.is_contiguous()
    assert relative(function(strided), function(A)) <= 1e-14


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-3, 1.0])
@pytest.mark.parametrize("function", [linalg.orthonormalize, linalg.polar])
def test_derivatives_are_right_also_near_orthonormal_matrices(function, distance):
    A = torch.linalg.qr(gaussian(5, 3, seed=0)).Q + distance * gaussian(5, 3, seed=1)
    assert torch.autograd.gradcheck(function, A.requires_grad_())
    assert torch.autograd.gradgradcheck(function, A)
    assert torch.autograd.gradcheck(function, A, check_forward_ad=True)


@pytest.mark.parametrize("distance", [1e-9, 1e-4])
def test_forward_derivatives_have_the_precision_of_those_backwards(distance):
    A = torch.linalg.qr(gaussian(120, 96, seed=0)).Q + distance * gaussian(120, 96, seed=1)
    A, D = A.float(), gaussian(120, 96, seed=2, dtype=torch.float32)
    exact = torch.func.jvp(linalg.polar, (A.double(),), (D.double(),))[1]
    assert relative(torch.func.jvp(linalg.polar, (A,), (D,))[1], exact) <= 1e-5
    backwards = torch.autograd.functional.vjp(linalg.polar, A.double(), exact)[1]
    assert float((backwards * D).sum()) == pytest.approx(float(exact.square().sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_divided_in_float32(dtype):
    A, B = gaussian(4, 4, seed=0).to(dtype), gaussian(6, 4, seed=1).to(dtype)
    assert torch.equal(linalg.solve_right(B, A), linalg.solve_right(B.float(), A.float()).to(dtype))
    assert torch.equal(linalg.inverse(A), linalg.inverse(A.float()).to(dtype))


def test_solve_right_divides_and_refuses_a_singular_divisor():
    A, B = gaussian(2, 4, 4, seed=0), gaussian(2, 6, 4, seed=1)
    assert relative(linalg.solve_right(B, A) @ A, B) <= 1e-12
    A[1] = 0.0
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        linalg.solve_right(B, A)
