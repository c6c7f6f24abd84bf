"""Upper bounds of l2 norms in float64, of entries so small or large that squares leave it."""

from __future__ import annotations

import torch
from torch import Tensor

UP = 1.0 + 1e-14  # covers the few roundings of a scalar formula in float64
SMALLEST = 2.0**-1022  # of numbers with full precision: what underflows is rounded up to it


def lengths(rows: Tensor) -> Tensor:
    """l2 norms (n,) of rows (n, k), without underflow or overflow of their squares."""
    if rows.shape[1] == 0:
        return rows.new_zeros(len(rows))
    largest = rows.abs().amax(1)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest)).clamp_min(SMALLEST)
    return scale * (rows / scale[:, None]).norm(dim=1)


def frobenius(x: Tensor | None) -> float:
    """Upper bound of ‖x‖ in float64; 0 for None."""
    return 0.0 if x is None else float(lengths(x.detach().double().reshape(1, -1))) * UP
