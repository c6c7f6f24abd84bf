"""Singular value decompositions that do not give up on clustered spectra."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..precision import compute_dtype
from ._common import all_finite, check_matrix, checked


class SVD(NamedTuple):
    """Factors of ``A = U diag(s) Vh``, the singular values in decreasing order."""

    U: Tensor
    s: Tensor
    Vh: Tensor


def _finite(found: SVD) -> SVD:
    """Raise if LAPACK reports success but returns NaN or Inf for a finite matrix."""
    if found.s.device.type == "cpu" and not all(map(all_finite, found)):
        raise torch.linalg.LinAlgError("the SVD of a finite matrix holds NaN or Inf")
    return found


def _svd_one(A: Tensor) -> SVD:
    """SVD of one matrix that LAPACK's divide and conquer refused: float64, then rotated."""
    wide = A.double()
    generator = torch.Generator().manual_seed(0)
    for attempt in range(9):
        try:
            if attempt == 0:
                found = _finite(SVD(*torch.linalg.svd(wide, full_matrices=False)))
                return SVD(*(x.to(A.dtype) for x in found))
            # A rotation changes the rounding of the bidiagonal form, on which convergence hangs.
            n = A.shape[-1]
            rotation = torch.linalg.qr(
                torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu")
            ).Q.to(A.device)
            U, s, Vh = _finite(SVD(*torch.linalg.svd(wide @ rotation, full_matrices=False)))
            return SVD(U.to(A.dtype), s.to(A.dtype), (Vh @ rotation.mT).to(A.dtype))
        except torch.linalg.LinAlgError:
            continue
    raise torch.linalg.LinAlgError(
        f"no SVD converged in 9 attempts for a finite matrix of shape {tuple(A.shape)}"
    )


def svd(A: Tensor) -> SVD:
    """Thin SVD that survives the matrices on which LAPACK's divide and conquer gives up.

    Clustered float32 spectra, which is what a well-conditioned core has, make
    ``torch.linalg.svd`` fail now and then. The matrices of the batch for which it fails are done
    again in float64, and then, if need be, after a random rotation.

    Parameters
    ----------
    A : Tensor, shape (..., m, n)
        Finite.

    Returns
    -------
    SVD
        ``U`` (..., m, k), ``s`` (..., k) decreasing, ``Vh`` (..., k, n), k = min(m, n).

    Raises
    ------
    ValueError
        On the CPU, if `A` is not finite.
    torch.linalg.LinAlgError
        If nothing converged.

    Notes
    -----
    Within ``torch.compile`` and ``torch.export`` it is ``torch.linalg.svd`` itself: a graph can
    neither look at values nor try again.
    """
    if torch.compiler.is_compiling():
        check_matrix(A, "A")
        return SVD(*torch.linalg.svd(A.to(compute_dtype(A.dtype)), full_matrices=False))
    A = checked(A, "A")
    try:
        return _finite(SVD(*torch.linalg.svd(A, full_matrices=False)))
    except torch.linalg.LinAlgError:
        if A.ndim == 2:
            return _svd_one(A)
        parts = [svd(B) for B in A.reshape(-1, *A.shape[-2:])]
        lead = A.shape[:-2]
        U, s, Vh = (torch.stack(list(x)) for x in zip(*parts, strict=True))
        return SVD(
            U.reshape(*lead, *U.shape[1:]),
            s.reshape(*lead, *s.shape[1:]),
            Vh.reshape(*lead, *Vh.shape[1:]),
        )


def svdvals(A: Tensor) -> Tensor:
    """Singular values in decreasing order, shape (..., min(m, n)); robust like :func:`svd`."""
    A = checked(A, "A")
    try:
        s = torch.linalg.svdvals(A)
        if s.device.type != "cpu" or all_finite(s):
            return s
    except torch.linalg.LinAlgError:
        pass
    return svd(A).s
