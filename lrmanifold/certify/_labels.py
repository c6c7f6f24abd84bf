"""Classes of samples, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._arguments import shown


def check_labels(y: Any, count: int, classes: int, *, wait: bool = True) -> None:
    """Raise ValueError unless `y` holds `count` classes, integers in 0..classes-1.

    With ``wait=False`` the numbers of a tensor on an accelerator are not looked at.
    """
    wrong = not isinstance(y, Tensor) or y.shape != (count,)
    if wrong or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"y must hold {count} integer classes, got {shown(y)}")
    if (wait or y.device.type == "cpu") and bool(((y < 0) | (y >= classes)).any()):
        raise ValueError(f"y must be in 0..{classes - 1}, got {int(y.min())}..{int(y.max())}")
