"""The loss that attacks increase: cross entropy without its saturation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import compute_dtype

LEAST_SPREAD, LARGEST_SPREAD = 8.0, 64.0  # of ordinary logits, max - min
_STEEPEST = 1024.0  # gradient that logits get: a model in float16 ends at 65504


def margin_loss(logits: Tensor, y: Tensor) -> Tensor:
    """logsumexp_{j != y} z_j - z_y of each sample, shape (B,).

    Of logits that are spread (max_j z_j - min_j z_j) over 8 to 64 the gradient is that of cross
    entropy divided by 1 - p_y, a positive number for each sample. So steps of :func:`fgsm` and
    :func:`pgd` are those of cross entropy, except that nothing vanishes where p_y rounds to 1 (in
    float32 from a margin of 16.6 on, in bfloat16 of 7).

    Others are first multiplied by the power of two that brings the spread into 8..16 or 32..64.
    Decisions do not change, and steps are the same for all scales by powers of two on one side of
    that range: those of cross entropy of the scaled logits, other ones than of the logits as they
    are. Where that factor is beyond 1024 the loss is divided by the rest, a positive number for
    each sample, so that gradients do not overflow in a model in half precision. float16 and
    bfloat16 are computed in float32.

    Parameters
    ----------
    logits, y : Tensor, shapes (B, classes) and (B,)

    Raises
    ------
    ValueError
        If y does not hold one class for each row of the logits.
    """
    if logits.ndim != 2 or y.shape != logits.shape[:1]:
        raise ValueError(
            "logits must have shape (B, classes) and y shape (B,), got "
            f"{tuple(logits.shape)} and {tuple(y.shape)}"
        )
    z = logits.to(compute_dtype(logits.dtype))
    factor = ordinary_factor(z.detach())
    z, own = z * factor[:, None], y[:, None]
    value = z.scatter(1, own, -math.inf).logsumexp(1) - z.gather(1, own)[:, 0]
    return value * (_STEEPEST / factor).clamp_max(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y of each sample, at least float32: positive where fooled."""
    z = logits.to(compute_dtype(logits.dtype))
    return z.scatter(1, y[:, None], -math.inf).amax(1) - z.gather(1, y[:, None])[:, 0]


def ordinary_factor(z: Tensor) -> Tensor:
    """The power of two of each sample that makes its spread ordinary; 1 where it is. In float32."""
    z = z.to(compute_dtype(z.dtype))  # the factor itself may be beyond float16
    spread = z.amax(1) - z.amin(1)
    # equal logits have no scale; +-100 keeps the factor inside float32
    exponent = torch.where(spread > 0, spread, 1.0).log2().floor().clamp(-100, 100)
    small, large = math.log2(LEAST_SPREAD) - exponent, math.log2(LARGEST_SPREAD) - 1 - exponent
    power = small.clamp_min(0) + large.clamp_max(0)
    return torch.where(spread > 0, power.exp2(), torch.ones_like(power))
