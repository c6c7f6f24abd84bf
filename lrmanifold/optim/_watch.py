"""Warnings about training that goes wrong in silence: foreign optimizers and skipped steps."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import geoopt
import torch
from torch import Tensor

from .._stack import stack_level
from ..manifolds import FixedRank
from ..parameter import manifold_of
from .accelerator import is_accelerated

_EVERY = 16  # steps between two looks at an accelerator's counters
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


class SkipWatch:
    """Warns when steps were left out for NaN or Inf: at once on the CPU, later on accelerators.

    An accelerator is never waited for: its counters are copied every 16 steps, and read at a step
    after the copy has arrived. Steps replayed from a captured graph are not seen.
    """

    def __init__(self) -> None:
        self._calls, self._said = 0, 0
        self._copies: list[tuple[Tensor, Any]] = []

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at the counters after a step."""
        self._calls += 1
        found = [s["skipped"] for s in optimizer.state.values() if "skipped" in s]
        there = [x for x in found if is_accelerated(x)]
        count = max((int(x) for x in found if not is_accelerated(x) and not x.is_meta), default=0)
        if there:
            capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            if not capturing:  # an event must not be asked while a graph is captured
                count = max(count, self._arrived())
            if self._calls % _EVERY == 0 and not self._copies and not capturing:
                self._send(there)
        # Again at ten times as many: a run that recovered is not told at every step.
        if count and count >= 10 * self._said:
            self._said = count
            warnings.warn(
                f"{type(optimizer).__name__} has left out {count} of its steps so far, because "
                "gradients held NaN or Inf or a step overflowed: the weights stayed as they were. "
                "Is there NaN in the data or the loss, is lr too large, or optimizer.zero_grad() "
                "missing, so that gradients add up? optimizer.skipped_steps has the count",
                stacklevel=stack_level(),
            )

    def _send(self, counters: list[Tensor]) -> None:
        by_device: dict[torch.device, list[Tensor]] = {}
        for x in counters:
            by_device.setdefault(x.device, []).append(x)
        for device, some in by_device.items():
            largest = torch.stack(some).max()
            event = None
            if device.type == "cpu":
                here = largest
            else:
                here = torch.empty((), dtype=largest.dtype, pin_memory=device.type == "cuda")
                here.copy_(largest, non_blocking=True)
                event = torch.Event(device)
                event.record(torch.accelerator.current_stream(device))
            self._copies.append((here, event))

    def _arrived(self) -> int:
        """The largest count of the copies, once all are here; 0 before."""
        if not self._copies or not all(e is None or e.query() for _, e in self._copies):
            return 0
        count = max(int(x.numpy()) for x, _ in self._copies)
        self._copies = []
        return count


def _keeps_manifolds(optimizer: Any) -> bool:
    from .optimizer import GeometricOptimizer

    known = (GeometricOptimizer, geoopt.optim.mixin.OptimMixin)
    # Wrappers such as ZeroRedundancyOptimizer hold the optimizer that makes the step.
    return isinstance(optimizer, known) or any(
        isinstance(x, known) for x in vars(optimizer).values()
    )


def warn_of_foreign_optimizer(optimizer: Any, *_: Any) -> None:
    """Hook after every optimizer's step: warn once if it moved low-rank weights and is foreign."""
    if torch.compiler.is_compiling() or optimizer in _warned or _keeps_manifolds(optimizer):
        return
    moved = sum(
        isinstance(p, geoopt.ManifoldParameter)
        and p.grad is not None
        and isinstance(manifold_of(p), FixedRank)
        for group in optimizer.param_groups
        if isinstance(group.get("lr"), Tensor) or group.get("lr") != 0
        for p in group["params"]
    )
    if moved:
        _warned.add(optimizer)
        name = type(optimizer).__name__
        warnings.warn(
            f"{name} moved {moved} low-rank weights as if they were ordinary tensors, so that they "
            "leave their manifold: rank and condition number are no longer kept. Use "
            "lrmanifold.optim.CondLR, CondLRAdam or CondLRMuon, or an optimizer of geoopt.optim; "
            "bring a weight back by p.data.copy_(p.manifold.projx(p))",
            stacklevel=stack_level(),
        )
