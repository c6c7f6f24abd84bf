"""Replacing the tensor behind a parameter."""

from __future__ import annotations

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
