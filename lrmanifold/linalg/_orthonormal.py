"""Orthonormal bases of tall matrices: Cholesky-QR and the polar factor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import without_autocast
from ._common import check_matrix, checked, compute_dtype, differentiated
from ._newton_schulz import inverse_square_root, polar_square
from ._svd import svd, svdvals


def _check_tall(A: Tensor, name: str) -> None:
    if A.shape[-2] < A.shape[-1]:
        raise ValueError(
            f"{name} must have at least as many rows as columns, got shape {tuple(A.shape)}"
        )


# Width of the blocks of a Gram matrix: narrow enough to skip almost half, wide enough for BLAS.
_GRAM_BLOCK = 64
# Rows above which a sum in float32 loses digits: its error grows with the number of terms.
_TALL = 8192
# Up to 16 columns some libraries add one row after the other: off by 1e-5 at 50,000 rows. Below
# 1,024 rows blocks cost more than they mend.
_NARROW_FROM, _NARROW_BLOCK = 1024, 256


def gram(A: Tensor) -> Tensor:
    """``AᵀA``, shape (..., r, r).

    Of a tall float32 matrix by blocks of 8,192 rows (a narrow one: 256) that are added in float64:
    the error stays at 2e-7 where plain sums reach 5e-4 at a million rows. Of a wide one on the CPU
    by the blocks of its upper half: BLAS has ``syrk`` for this, which torch does not offer; blocks
    get two thirds of its gain.
    """
    rows, r = A.shape[-2:]
    narrow = r <= 16 and A.device.type == "cpu"
    limit, block = (_NARROW_FROM, _NARROW_BLOCK) if narrow else (_TALL, _TALL)
    if rows > limit and A.dtype == torch.float32:
        whole = rows // block * block
        blocks = A[..., :whole, :].unflatten(-2, (-1, block))
        G = (blocks.mT @ blocks).sum(-3, dtype=torch.float64)
        rest = A[..., whole:, :]
        return (G + rest.mT @ rest).to(A.dtype)
    if r < 1.5 * _GRAM_BLOCK or A.ndim > 2 or A.device.type != "cpu" or differentiated(A):
        return A.mT @ A
    G = A.new_empty(r, r)
    for i in range(0, r, _GRAM_BLOCK):
        j = min(i + _GRAM_BLOCK, r)
        torch.mm(A[:, i:j].mT, A[:, i:], out=G[i:j, i:])
        G[i:j, :i] = G[:i, i:j].mT
    return G


def _cholesky_pass(A: Tensor, *, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """One Cholesky-QR pass; returns Q, R and the Cholesky status (0 where it succeeded)."""
    # The true Gram, not I + DᵀD of a known increment: it removes the drift of each step instead of
    # carrying it into the next (mathematics 2).
    G = gram(A)
    L, info = torch.linalg.cholesky_ex(G)
    if shift:
        rows, cols = A.shape[-2:]
        trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
        # Shift of Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa 2020 (shifted Cholesky-QR).
        eps = torch.finfo(A.dtype).eps
        amount = 11.0 * (rows * cols + cols * (cols + 1)) * eps * trace
        amount = torch.where(info > 0, amount, torch.zeros_like(amount))
        identity = torch.eye(cols, dtype=A.dtype, device=A.device)
        L, info = torch.linalg.cholesky_ex(G + amount[..., None, None] * identity)
    Q = torch.linalg.solve_triangular(L, A.mT, upper=False).mT
    return Q, L.mT, info


def _householder(A: Tensor) -> tuple[Tensor, Tensor]:
    """QR by reflections, with the signs that make the diagonal of R positive."""
    Q, R = torch.linalg.qr(A)
    sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(A.dtype)
    return Q * sign[..., None, :], sign[..., :, None] * R


def inverse(A: Tensor) -> Tensor:
    """``A⁻¹`` of square matrices, shape (..., r, r), without a host synchronisation.

    Raises
    ------
    torch.linalg.LinAlgError
        On the CPU, if `A` is exactly singular. On an accelerator the result is Inf or NaN.
    """
    wide = compute_dtype(A.dtype)
    if wide != A.dtype:
        return inverse(A.to(wide)).to(A.dtype)
    result, info = torch.linalg.inv_ex(A)
    if A.device.type == "cpu" and bool(info.any()):
        raise torch.linalg.LinAlgError(
            f"the core S (shape {tuple(A.shape)}) is singular: the rank of the point has dropped"
        )
    return result


@without_autocast
def solve_right(B: Tensor, A: Tensor) -> Tensor:
    """``B A⁻¹`` for square `A`, shape (..., k, r) and (..., r, r), without a host synchronisation.

    By the explicit inverse: its forward error is that of a solve, eps cond(A), and for many rows
    the product runs several times faster than a triangular solve from the right.

    Raises
    ------
    torch.linalg.LinAlgError
        On the CPU, if `A` is exactly singular. On an accelerator the result is Inf or NaN.
    """
    wide = compute_dtype(B.dtype)
    if wide != B.dtype:
        return solve_right(B.to(wide), A.to(wide)).to(B.dtype)
    return B @ inverse(A)


def _defect(Q: Tensor) -> Tensor:
    """max |QᵀQ - I| of each matrix of the batch; NaN counts as infinite."""
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    defect = (gram(Q) - identity).abs().amax((-2, -1))
    return torch.nan_to_num(defect, nan=float("inf"))


@without_autocast
def qr(A: Tensor, *, rank_deficient: bool = False) -> tuple[Tensor, Tensor]:
    """Orthonormal basis and triangular factor, ``A = Q R`` with a non-negative diagonal of `R`.

    See :func:`orthonormalize` for method, cost and accuracy.

    Parameters
    ----------
    A : Tensor, shape (..., n, r)
        Of full column rank, ``n >= r``.
    rank_deficient : bool
        Accept dependent columns and wide matrices: always by Householder reflections, which
        complete the basis with arbitrary orthonormal columns (k = min(n, r) of them in all).

    Returns
    -------
    Q : Tensor, shape (..., n, r)
    R : Tensor, shape (..., r, r)
    """
    dtype = A.dtype
    A = checked(A, "A")
    if rank_deficient:
        Q, R = _householder(A)
        return Q.to(dtype), R.to(dtype)
    _check_tall(A, "A")
    if A.device.type == "cpu":
        Q, R = _qr_checked(A)
    else:
        Q, R = _qr_unchecked(A)
    return Q.to(dtype), R.to(dtype)


def _qr_checked(A: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky-QR twice, Householder for the matrices of the batch that need it."""
    # A scale near the ends of the exponent range would under- or overflow in the Gram matrix.
    scale = A.abs().amax((-2, -1), keepdim=True)
    if not bool((scale > 0).all()):
        raise ValueError("A must have full column rank, got an all-zero matrix")
    Q, R, info = _cholesky_pass(A / scale, shift=False)
    defect = _defect(Q)
    # A first pass that is right to 1e-2 is made right to roundoff by a second one.
    good = (info == 0) & (defect < 1e-2)
    Q2, R2, info2 = _cholesky_pass(Q, shift=False)
    R2 = R2 @ R
    good = good & (info2 == 0)
    if not bool(good.all()):
        # Rows and columns of failed Cholesky factors may hold NaN: select, never blend.
        Qh, Rh = _householder(A / scale)
        # A lost rank leaves sigma_min about eps; cond 1e6, which must pass, 8 eps in float32.
        sigma = svdvals(Rh)
        rank_lost = sigma[..., -1] <= 4.0 * torch.finfo(A.dtype).eps * sigma[..., 0]
        if bool((rank_lost & ~good).any()):
            raise ValueError(
                "A must have full column rank, got a matrix whose columns are dependent "
                f"to working precision (shape {tuple(A.shape)})"
            )
        Q2 = torch.where(good[..., None, None], Q2, Qh)
        R2 = torch.where(good[..., None, None], R2, Rh)
    return Q2, R2 * scale


def _qr_unchecked(A: Tensor) -> tuple[Tensor, Tensor]:
    """Shifted Cholesky-QR three times in float64: no decision, so the host never waits."""
    dtype = A.dtype
    scale = A.abs().amax((-2, -1), keepdim=True)
    Q, R, _ = _cholesky_pass((A / scale).double(), shift=True)
    Q, R2, _ = _cholesky_pass(Q, shift=False)
    Q, R3, _ = _cholesky_pass(Q, shift=False)
    return Q.to(dtype), ((R3 @ R2 @ R) * scale).to(dtype)


def orthonormalize(A: Tensor) -> Tensor:
    """Orthonormal basis of the columns of `A`: the Q of a QR with positive diagonal.

    Cholesky-QR, ``R = chol(AᵀA)``, ``Q = A R⁻¹``, done twice: all work is in matrix products and
    one triangular solve, 8 n r² flops. One pass loses ``eps cond(A)²``; the second restores full
    orthonormality when the first was right to 1e-2. Where it was not (``cond(A)`` over about 1e2 in
    float32, 1e7 in float64), or Cholesky broke down, that matrix of the batch alone is done by
    Householder reflections. On an accelerator the decision would cost a host synchronisation:
    there three shifted passes in float64 are made, which covers every condition number up to 1e6
    in either precision.

    Parameters
    ----------
    A : Tensor, shape (..., n, r)
        Of full column rank, ``n >= r``.

    Returns
    -------
    Tensor, shape (..., n, r)
        Orthonormal to 1e-6 in float32 and 1e-13 in float64.

    Raises
    ------
    ValueError
        On the CPU, if `A` is wide, not finite or rank-deficient to working precision.

    References
    ----------
    Y. Yamamoto et al., *Roundoff error analysis of the Cholesky-QR2 algorithm*, 2015;
    T. Fukaya et al., *Shifted Cholesky QR for computing the QR factorization of ill-conditioned
    matrices*, 2020. mathematics 2.
    """
    return qr(A)[0]


def polar(A: Tensor, *, rank_deficient: bool = False) -> Tensor:
    """Orthonormal polar factor ``A (AᵀA)^(-1/2)``: the orthonormal matrix nearest to `A`.

    Unlike the Q of a QR it commutes with rotations, ``polar(B A C) = B polar(A) C`` for orthogonal
    `B`, `C`, so what is built on it does not depend on the gauge of a factorisation.

    Near an orthonormal matrix, up to scale (``|AᵀA/c - I|_F <= 0.5``, the case of every small step
    of an optimizer), the inverse square root of the Gram matrix comes from a few Newton-Schulz
    products: 4 n r² + O(r³) flops. Further away from ``A = QR`` and the SVD of `R`.

    Parameters
    ----------
    A : Tensor, shape (..., n, r)
        Of full column rank, ``n >= r``.
    rank_deficient : bool
        Accept dependent columns on the CPU: one of the nearest orthonormal matrices, with the
        SVD's own bases.

    Returns
    -------
    Tensor, shape (..., n, r)

    Raises
    ------
    ValueError
        On the CPU, if `A` is wide, not finite or, unless accepted, rank-deficient to working
        precision.

    References
    ----------
    N. J. Higham, *Functions of Matrices*, 2008, ch. 6 and 8.
    """
    return _polar(A, rank_deficient)[0]


@without_autocast
def polar_decomposition(A: Tensor) -> tuple[Tensor, Tensor]:
    """``A = Q H``: orthonormal polar factor (..., n, r), and symmetric ``H = QᵀA`` (..., r, r).

    As :func:`polar`, and a product of 2 n r² flops.
    """
    Q = polar(A)
    return Q, Q.mT @ A


@without_autocast
def polar_with_root(A: Tensor) -> tuple[Tensor, Tensor]:
    """``Q = A K``: orthonormal polar factor (..., n, r), and ``K = (AᵀA)^(-1/2)`` (..., r, r).

    As :func:`polar`, at no further cost where `A` is near an orthonormal matrix up to scale.
    """
    Q, K = _polar(A)
    wide = compute_dtype(A.dtype)
    return Q, (inverse(Q.mT.to(wide) @ A.to(wide)) if K is None else K).to(A.dtype)


@without_autocast
def _polar(A: Tensor, rank_deficient: bool = False) -> tuple[Tensor, Tensor | None]:
    """The polar factor, and the inverse square root of AᵀA where that was formed."""
    dtype = A.dtype
    check_matrix(A, "A")
    A = A.to(compute_dtype(dtype))
    _check_tall(A, "A")
    if A.device.type != "cpu":
        Q, R = _qr_unchecked(A)
        return (Q @ polar_square(R)).to(dtype), None
    G = gram(A)
    scale = G.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    tiny = torch.finfo(A.dtype).tiny
    E = G / scale.clamp_min(tiny) - identity
    defect = torch.linalg.matrix_norm(E)
    # A NaN or Inf in A is one on the diagonal of G.
    near = (defect <= 0.5) & (scale[..., 0, 0] > tiny) & torch.isfinite(defect)
    if bool(near.all()):
        worst = float(defect.detach().max()) if defect.numel() else 0.0
        root = inverse_square_root(E, worst) / scale.sqrt()
        return (A @ root).to(dtype), root
    A = checked(A, "A")
    if A.ndim > 2:
        flat = A.reshape(-1, *A.shape[-2:])
        each = [polar(B, rank_deficient=rank_deficient) for B in flat]
        return torch.stack(each).reshape(A.shape).to(dtype), None
    Q, R = _householder(A) if rank_deficient else _qr_checked(A)
    U, _, Vh = svd(R)
    P = Q @ (U @ Vh)
    # The rounding of three factors, 20 eps in float32, by one step of Newton-Schulz.
    return (P - 0.5 * (P @ (gram(P) - identity))).to(dtype), None
