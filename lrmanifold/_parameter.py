"""The tensor behind a parameter: replacing it, and gathering one that is sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def replace_data(p: Tensor, X: Tensor) -> None:
    """Give a parameter another tensor of its dtype, of any shape, and drop its gradient.

    Autograd remembers the shape of a leaf for as long as some graph over it is alive (a loss that
    the caller keeps, say), and forgets it only when the dtype changes: pass through another one.
    """
    p.grad = None
    other = torch.float32 if p.dtype == torch.float64 else torch.float64
    p.data = torch.empty(0, dtype=other, device=p.device)
    p.data = X


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor; without the cost of importing those where there are none."""
    return getattr(x, "placements", None) is not None and hasattr(x, "full_tensor")


def gathered(X: Tensor) -> Tensor:
    """The whole tensor; of a DTensor, all its processes take part."""
    return X.full_tensor() if is_sharded(X) else X  # type: ignore[attr-defined]
