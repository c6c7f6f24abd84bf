"""Polar factors and inverse square roots from matrix products alone.

On an accelerator a LAPACK-style decomposition waits for the host twice: once to run, once to report
whether it converged. The iterations here have a *fixed* number of products, so that nothing waits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._common import differentiated


def scaled_newton_schulz(X: Tensor, *, lower: float | None = None) -> Tensor:
    r"""Polar factor of a matrix with singular values in ``[lower, 1]``, by products only.

    The iteration is :math:`X \leftarrow \tfrac12 \mu X (3I - \mu^2 X^\top X)` with the scaling
    :math:`\mu^2 = 3/(1 + l + l^2)` that is optimal for singular values in :math:`[l, 1]`, but at
    most 1.6977, which maps 1 to 0.1: a small singular value grows by up to 2.55 a step instead of
    3/2.

    Parameters
    ----------
    X : Tensor, shape (..., m, n)
        Singular values at most 1. Those below `lower` come out smaller than 1 instead of failing,
        which is what a matrix sign needs.
    lower : float, optional
        A lower bound for the singular values that matter; a tenth of the unit roundoff by default.

    Returns
    -------
    Tensor, shape (..., m, n)

    References
    ----------
    J. Chen and E. Chow, *A stable scaling of Newton-Schulz for improving the sign function
    computation of a Hermitian matrix*, 2014.
    """
    eps = torch.finfo(X.dtype).eps
    bound = eps / 10 if lower is None else lower
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    while bound < 1 - 1e-3:
        # Without the cap 1 would go to about l, and for small l lose its sign to rounding there.
        mu = min(math.sqrt(3.0 / (1.0 + bound + bound * bound)), 1.69770248526)
        X = (0.5 * mu) * (X @ (3.0 * identity - mu * mu * (X.mT @ X)))
        bound = min(0.5 * mu * x * (3.0 - mu * mu * x * x) for x in (bound, 1.0))
    # Two plain steps: the error 1 - sigma is squared by each, so 1e-3 ends below the roundoff.
    steps = 2 if eps > 1e-10 else 3
    for _ in range(steps):
        X = 0.5 * (X @ (3.0 * identity - X.mT @ X))
    return X


# Condition number 7; the iteration for a root is unstable from 9 on.
_STABLE = 0.75
# Coefficients of (1 + x)^(-1/2).
_SERIES = (1.0, -1 / 2, 3 / 8, -5 / 16, 35 / 128, -63 / 256)


def inverse_square_root(E: Tensor, size: float) -> Tensor:
    """``(I + E)^(-1/2)`` of symmetric `E`, shape (..., r, r), by as few products as `size` allows.

    The binomial series while it needs at most three products, Newton-Schulz beyond: the plain
    iteration, which is stable up to condition numbers of 9. Differentiable.

    Parameters
    ----------
    E : Tensor
    size : float
        A bound for ‖E‖₂ of every matrix of the batch, at most 0.75; at most 0.5 to be fast.

    Raises
    ------
    ValueError
        If `size` is larger, or NaN.

    References
    ----------
    N. J. Higham, *Functions of Matrices*, 2008, section 6.4.
    """
    if not size <= _STABLE:
        raise ValueError(f"size must be at most {_STABLE}, the iteration is unstable, got {size!r}")
    recorded = differentiated(E)
    degree = None if recorded else _series_degree(E, size)
    if degree is not None:
        return _series(_powers(E, degree))
    eps = torch.finfo(E.dtype).eps
    # Differentiated, two more: the value converges before its first and second derivative.
    steps = 2 if recorded else 0
    while size > eps and steps < 40:
        size = 0.75 * size**2 + 0.25 * size**3
        steps += 1
    # K = I + D with the residual R = K (I + E) K - I: products of small matrices only, as those of
    # I + E and K would each leave the rounding of sums near 1.
    D, R = torch.zeros_like(E), E
    for k in range(steps):
        if k:
            F = D + E + E @ D
            R = D + F + D @ F
        D = D - 0.5 * (R + D @ R if k else R)
    return D + torch.eye(E.shape[-1], dtype=E.dtype, device=E.device)


def _series_degree(E: Tensor, size: float) -> int | None:
    """Where the binomial series may end; None if that takes more than three products."""
    eps = torch.finfo(E.dtype).eps
    for degree in range(1, len(_SERIES) - 1):
        if abs(_SERIES[degree + 1]) * size ** (degree + 1) <= 0.5 * eps * (1.0 - size):
            return degree
    return None


def _powers(E: Tensor, degree: int) -> list[Tensor]:
    """E, E², ..., E^degree."""
    powers = [E]
    for _ in range(degree - 1):
        powers.append(powers[-1] @ E)
    return powers


def _series(powers: list[Tensor]) -> Tensor:
    """I + Σ c_k E^k over the powers at hand."""
    # From the smallest term on, or rounding would add up.
    total = _SERIES[len(powers)] * powers[-1]
    for k in range(len(powers) - 1, 0, -1):
        total = torch.add(total, powers[k - 1], alpha=_SERIES[k])
    total.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return total


def polar_square(R: Tensor, *, lower: float | None = None) -> Tensor:
    """Orthogonal polar factor of square matrices, shape (..., r, r), without a decomposition.

    `lower` is relative to the Frobenius norm; see :func:`scaled_newton_schulz`. NaN for a matrix
    that is singular to working precision and has no orthogonal factor here.
    """
    norm = torch.linalg.matrix_norm(R, keepdim=True).clamp_min(torch.finfo(R.dtype).tiny)
    Q = scaled_newton_schulz(R / norm, lower=lower)
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    defect = torch.linalg.vector_norm(Q.mT @ Q - eye, math.inf, dim=(-2, -1), keepdim=True)
    return torch.where(defect < 1e-3, Q, math.nan)
