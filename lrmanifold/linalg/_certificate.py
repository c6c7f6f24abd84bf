"""A proof, by matrix products alone, that a core is well-conditioned already."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..precision import without_autocast
from ._common import check_square, checked
from ._orthonormal import gram

# Squarings of the defect after which its norm is looked at; the last bound is at most r^(1/16)
# times too large, 1.33 for r = 100.
_LOOKS = (0, 2, 3)


@without_autocast
def condition_bound(S: Tensor) -> Tensor:
    r"""Upper bound for the condition number, without a decomposition.

    With :math:`E = S^\top S/c - I`, c the mean squared singular value, all squared singular values
    lie in :math:`c\,[1 - e, 1 + e]` for every :math:`e \ge \|E\|_2`, hence
    :math:`\mathrm{cond}(S)^2 \le (1 + e)/(1 - e)`. Here
    :math:`e = \|E^{2^k}\|_F^{1/2^k}`, which falls towards ‖E‖₂ with k: k = 0 is the bound by
    Frobenius' norm, too large by up to √r; k = 3, after three products of size r, by r^(1/16).

    An allowance for rounding is included. Cores of any size have the same bound: they are brought
    to a largest entry of 1 first, as squares would leave the range of the dtype.

    Parameters
    ----------
    S : Tensor, shape (..., r, r)

    Returns
    -------
    Tensor, shape (...)
        Infinite where nothing is proved (e >= 1). Differentiable; 0 is taken where E = 0, and where
        the bound is infinite.
    """
    S = checked(S, "S")
    check_square(S, "S")
    bounds = []
    if S.numel():
        size = torch.linalg.vector_norm(S.detach(), math.inf, dim=(-2, -1), keepdim=True)
        S = S / size.clamp_min(torch.finfo(S.dtype).tiny)
    E, _ = relative_defect(S)
    for e in _defect_bounds(E):
        # where twice: the root of a negative number has a derivative of NaN, even times zero
        small = torch.where(e < 1.0, e, 0.0)
        bound = ((1.0 + small) / (1.0 - small)).sqrt()
        bounds.append(torch.where(e < 1.0, bound, math.inf))
    return torch.stack(bounds).amin(0)


def relative_defect(S: Tensor) -> tuple[Tensor, Tensor]:
    """E = SᵀS/c - I and c, the mean squared singular value, shape (..., 1, 1)."""
    E = gram(S)
    c = E.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    E = E / c
    E.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return E, c


def certified(E: Tensor, kappa: float) -> bool:
    """Whether cond <= kappa is proved for every matrix with the relative defect `E`, on the CPU."""
    for e in _defect_bounds(E):
        worst = float(e.max())
        if worst < 1.0 and (1.0 + worst) <= kappa * kappa * (1.0 - worst):
            return True
    return False


def _defect_bounds(E: Tensor) -> Iterator[Tensor]:
    """Falling upper bounds for ‖E‖₂, each dearer than the last."""
    # The entries of SᵀS are sums of r terms, |fl(SᵀS) - SᵀS| <= r eps |Sᵀ||S|: with the signs of
    # rounding at random, as they are, its 2-norm is about eps c, at most r eps c. A division of S
    # by its size, of relative error eps/2 an entry, adds at most as much.
    rounding = 4.0 * E.shape[-1] * torch.finfo(E.dtype).eps
    norm = torch.linalg.vector_norm(E, dim=(-2, -1), keepdim=True)
    # Of unit norm, or high powers of a small defect would underflow to a proof of everything.
    E = E / norm.clamp_min(torch.finfo(E.dtype).tiny)
    for k in range(max(_LOOKS) + 1):
        E = E @ E if k else E
        if k in _LOOKS:
            size = torch.linalg.vector_norm(E, dim=(-2, -1))
            # a root of 0 has an infinite slope; above, no power of E comes near the limit
            e = norm[..., 0, 0] * size.clamp_min(torch.finfo(E.dtype).tiny) ** (0.5**k)
            yield e * (1.0 + rounding) + rounding
