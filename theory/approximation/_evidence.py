"""From comparisons along many paths to one verdict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import Evidence, inequality, not_met

# Ratios are reported after this share of [0, T]: near t = 0 both sides of a bound coincide.
LATE = 0.1
# Rounding of distances between O(1) matrices in float64, SVDs included.
ROUNDING = 1e-11


def below(x: Tensor, limit: Tensor | float) -> Tensor:
    """``x < limit``, and true where one is NaN: what cannot be compared is to fail, not to skip."""
    return ~(x >= limit)


def along_paths(
    measured: Tensor,
    bound: Tensor,
    met: Tensor,
    *,
    moved: Tensor | float = 0.0,
    reason: str,
    detail: dict[str, Any] | None = None,
) -> Evidence:
    """Evidence for ``measured <= bound`` at every time after 0 and for every problem.

    Parameters
    ----------
    measured, bound : Tensor, shape (times, B)
    met : Tensor of bool, shape (B,)
        Problems outside the hypotheses are left out and counted; if there is no other, the sample
        is skipped, with `reason`. Made with :func:`below`.
    moved : Tensor, shape (times, B), or float
        Relative error of the comparison in time, from step doubling: the tolerance.
    """
    if not bool(met.any()):
        return not_met(reason)
    measured, bound = measured[1:, met], bound[1:, met]
    errors = moved[1:, met] if isinstance(moved, Tensor) else torch.full_like(bound, moved)
    slack = 1.0 + errors
    holds = bool((measured <= bound * slack + ROUNDING).all())
    late = slice(max(int(LATE * len(measured)), 1), None)
    ratio = measured[late] / bound[late].clamp_min(1e-300)
    ratio = torch.where(measured[late] <= ROUNDING, torch.zeros_like(ratio), ratio)
    place = int(ratio.argmax())
    worst = [float(x[late].reshape(-1)[place]) for x in (measured, bound)]
    found = {
        "step error": float(errors[late].max()),
        "problems left out": int((~met).sum()),
        **(detail or {}),
    }
    evidence = inequality(*worst, independent=int(met.sum()), detail=found)
    ratios = tuple(ratio.reshape(-1).tolist())
    return Evidence(
        evidence.measured, evidence.bound, holds, True, evidence.independent, found, ratios
    )


def summary(ratio: Tensor) -> tuple[float, float, float]:
    """Smallest, mean and largest of a tensor."""
    return float(ratio.min()), float(ratio.mean()), float(ratio.max())
