"""How the rates of an optimizer rise and fall over a training, and are there again after it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

if TYPE_CHECKING:
    from .training import Settings

_KEYS = ("lr", "initial_lr")


@contextlib.contextmanager
def scheduled(
    optimizer: torch.optim.Optimizer, settings: Settings, steps: int
) -> Iterator[LRScheduler]:
    """A schedule that begins with the rates the optimizer has; it has them again at the end.

    Left at the end of the schedule they would be 0 in the next training, which would not say so.
    """
    before = [
        {key: group[key] for key in _KEYS if key in group} for group in optimizer.param_groups
    ]
    for had, group in zip(before, optimizer.param_groups, strict=True):
        # schedules write into rates that are tensors
        had.update({key: rate.clone() for key, rate in had.items() if isinstance(rate, Tensor)})
        group.pop("initial_lr", None)  # of an earlier schedule, and torch would begin with it
    try:
        yield _schedule(optimizer, settings, steps)
    finally:
        for had, group in zip(before, optimizer.param_groups, strict=True):
            rate = group["lr"]
            group.pop("initial_lr", None)
            group.update(had)
            if isinstance(rate, Tensor):  # stays the tensor that a captured step reads
                group["lr"] = rate.copy_(torch.as_tensor(had["lr"]))


def _schedule(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> LRScheduler:
    if settings.schedule == "cosine" and not settings.warmup:
        return CosineAnnealingLR(optimizer, steps)
    rise = min(round(settings.warmup * steps), steps - 1)  # one step at least has the whole rate

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        left = max(0.0, (steps - step) / (steps - rise))
        return left if settings.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))

    return LambdaLR(optimizer, factor)
