"""Upper bounds of spectral norms that include the rounding of their own computation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import compute_dtype, without_autocast

_UNIT = 2.0**-53  # unit roundoff of float64
_ROUND_UP = 1.0 + 16.0 * _UNIT  # covers the few roundings of one scalar formula


def rounding_of_products(inner: int) -> float:
    """ε with ``|fl(A B) - A B| <= ε |A| |B|`` entrywise, inner dimension `inner`, in float64.

    Any order of summation, fused or not, real or complex (four real products and their sums):
    γ_n = n u/(1 - n u) of Higham, *Accuracy and stability of numerical algorithms*, 3.1 and 3.6,
    with room for the complex case.
    """
    n = 4.0 * (inner + 4)
    return n * _UNIT / (1.0 - n * _UNIT)


def spectral_norm_bound(A: Tensor, *, iterations: int = 30) -> Tensor:
    r"""An upper bound of ``‖A‖₂``, proved in floating point, at most a little above it.

    Gram iteration: with :math:`G_1 = A^*A`, :math:`G_{k+1} = G_k^* G_k`, each norm is bounded by
    the next, :math:`\|G_k\|_2^2 = \|G_{k+1}\|_2`, and the last by Frobenius' norm. The bound is
    above ‖A‖₂ by a factor of at most :math:`p^{1/2^{T+1}}`, p the smaller side, T the iterations:
    1 + 3e-9 for p = 1000 and T = 30. The rounding of each product is bounded and added, so no
    decomposition has to be trusted and nothing has to converge.

    Parameters
    ----------
    A : Tensor, shape (..., m, n)
        Real or complex; computed in float64 (complex128), into which shorter dtypes are exact.
    iterations : int
        T, at least 1. Each costs p³.

    Returns
    -------
    Tensor, shape (...), float64
        Not finite (NaN or Inf) where `A` is not, nor where ‖A‖₂ is beyond the largest number.

    Raises
    ------
    ValueError
        If `iterations` is below 1 or `A` is no matrix.

    References
    ----------
    B. Delattre, Q. Barthélemy, A. Araujo, A. Allauzen, *Efficient bound of Lipschitz constant for
    convolutional layers by Gram iteration*, ICML 2023, for the iteration in exact arithmetic.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if A.ndim < 2:
        raise ValueError(f"A must have shape (..., m, n), got {tuple(A.shape)}")
    with torch.no_grad():
        A = A.detach().to(torch.complex128 if A.is_complex() else torch.float64)
        if A.shape[-1] > A.shape[-2]:
            A = A.mH.resolve_conj()
        if A.numel() == 0:
            return A.real.new_zeros(A.shape[:-2])
        G, exponent = _scaled(A)
        scales, gaps = [exponent], []
        for _ in range(iterations):
            error = rounding_of_products(G.shape[-2]) * _frobenius(G).square() * _ROUND_UP
            G, exponent = _scaled(G.mH @ G)
            scales.append(exponent)
            gaps.append(error)
        bound = _frobenius(G)
        for scale, gap in zip(reversed(scales[1:]), reversed(gaps), strict=True):
            # |G_k|² <= |fl(G_k* G_k)| + error, in the units of G_k
            bound = (torch.ldexp(bound, scale) + gap).sqrt() * _ROUND_UP
        found = _times_power(bound, scales[0])
        # among the denormals that product was rounded, maybe downwards
        upwards = torch.nextafter(found, torch.full_like(found, torch.inf))
        tiny = torch.finfo(found.dtype).tiny
        return torch.where((bound > 0) & (found < tiny), upwards, found)


def _scaled(A: Tensor) -> tuple[Tensor, Tensor]:
    """A times a power of two, largest entry about 1, which is exact; and the exponent taken out."""
    largest = (torch.view_as_real(A).abs().amax(-1) if A.is_complex() else A.abs()).amax((-2, -1))
    exponent = torch.frexp(largest).exponent
    # entries so small that scaling rounds them to denormals are below 2^-1000 of the largest
    return _times_power(A, -exponent[..., None, None]), exponent


def _times_power(A: Tensor, exponent: Tensor) -> Tensor:
    """A · 2^exponent. In two halves: for 1e-310 that is 2^1029, which is no number."""
    half = exponent // 2
    one = torch.ones_like(exponent, dtype=torch.float64)
    return A * torch.ldexp(one, half) * torch.ldexp(one, exponent - half)


def _frobenius(A: Tensor) -> Tensor:
    """‖A‖_F, rounded upwards."""
    size = A.shape[-2] * A.shape[-1]
    square = torch.view_as_real(A).square().sum(-1) if A.is_complex() else A.square()
    return square.sum((-2, -1)).sqrt() * (1.0 + rounding_of_products(size))


def orthonormality_defect_bound(Q: Tensor) -> Tensor:
    r"""An upper bound of :math:`\|Q^\top Q - I\|_2`, shape (...), rounding included.

    ``√(1 + defect)`` bounds ‖Q‖₂ for a frame that is orthonormal up to rounding only.

    Parameters
    ----------
    Q : Tensor, shape (..., m, r)
    """
    with torch.no_grad():
        Q = Q.detach().double()
        gap = Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        error = rounding_of_products(Q.shape[-2]) * _frobenius(Q).square()
        return spectral_norm_bound(gap) * _ROUND_UP + error


@without_autocast
def gram_norm(A: Tensor, *, iterations: int = 6) -> Tensor:
    """‖A‖₂ by Gram iteration, differentiable: at most a factor p^(1/2^(T+1)) too large.

    For training. In the dtype of `A` (float32 for shorter ones) and without the rounding that
    :func:`spectral_norm_bound` adds.

    Parameters
    ----------
    A : Tensor, shape (..., m, n)
        Real or complex, not zero.
    iterations : int
        T, at least 1.

    Returns
    -------
    Tensor, shape (...)
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    wide = compute_dtype(A.dtype)
    G = A.to(wide)
    if G.shape[-1] > G.shape[-2]:
        G = G.mH
    tiny = torch.finfo(G.dtype).tiny
    logarithm: Tensor | float = 0.0
    for k in range(iterations):
        # scaled by its own size, which the logarithm gives back: squares would overflow
        size = torch.linalg.matrix_norm(G).clamp_min(tiny)
        logarithm = logarithm + size.log() / 2.0**k
        G = G / size[..., None, None]
        G = G.mH @ G
    last = torch.linalg.matrix_norm(G).clamp_min(tiny)
    return (logarithm + last.log() / 2.0**iterations).exp().to(A.real.dtype)
