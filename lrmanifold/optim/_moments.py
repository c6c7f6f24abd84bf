"""Second moments of a tangent vector: one number for each of its blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..manifolds import FixedRank, WellConditioned


def means_of_blocks(manifold: FixedRank, sums: Tensor) -> Tensor:
    """Mean squares from the sums of squares of the blocks U_p, M, V_p, shape (..., 3).

    Each for itself with a bound on the condition number, three times that of the whole vector
    without one (see :func:`lrmanifold.optim.adam_update`).
    """
    m, n, r = manifold.m, manifold.n, manifold.rank
    if isinstance(manifold, WellConditioned):
        counts = torch.tensor([m * r, r * r, n * r], dtype=sums.dtype, device=sums.device)
        return sums / counts
    return (sums.sum(-1, keepdim=True) / ((m + r + n) * r)).expand_as(sums)
