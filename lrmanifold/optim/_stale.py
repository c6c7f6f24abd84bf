"""A warning about an optimizer that was built before ``factorize`` and moves nothing new."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .._replaced import conversions, replaced, successors
from .._stack import stack_level
from .geometry import mark

# For each optimizer: after how many conversions it was found to be in order.
_in_order: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
# For each one that is not: what its old and the new parameters were like at its last step.
_last: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def warn_of_stale_optimizer(optimizer: Any, *_: Any) -> None:
    """Hook after every optimizer's step: warn once if it was built before a conversion.

    Only if nothing else can be meant: the new parameters get gradients, neither they nor the
    gradients of the old ones have changed since the optimizer's last step, and no optimizer that
    exists holds any of the new ones.
    """
    if torch.compiler.is_compiling():
        return
    count = conversions()
    if not count or _in_order.get(optimizer) == count:
        return
    old = replaced(_parameters(optimizer))
    if not old:
        _in_order[optimizer] = count
        return
    new = [q for q in successors(old) if q.grad is not None]
    if not new:
        return
    known = _last.get(optimizer)
    gradients, marks = [_Seen(p) for p in old], [*map(mark, new)]
    _last[optimizer] = count, gradients, marks
    if known is None or known[0] != count:
        return
    _in_order[optimizer] = count
    used = any(not before.still(p) for before, p in zip(known[1], old, strict=False))
    if used or known[2] != marks or _held(new):
        return
    name = type(optimizer).__name__
    warnings.warn(
        f"{name} was built before factorize, densify, fold, adapt or set_adapter: {len(old)} of "
        f"its parameters were replaced or frozen. No optimizer holds the {len(new)} new ones, so "
        "they do not move. Convert the model first, then build the optimizer",
        stacklevel=stack_level(),
    )


def _parameters(optimizer: Any) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


class _Seen:
    """The gradient that a parameter had: another one means that the parameter is still used."""

    def __init__(self, p: Tensor) -> None:
        # a weak reference: the id of a gradient that is gone may be that of the next one
        self._ref = None if p.grad is None else TensorWeakRef(p.grad)
        self._version = None if p.grad is None else p.grad._version

    def still(self, p: Tensor) -> bool:
        """Whether `p` has the same gradient, unchanged."""
        if self._ref is None or p.grad is None:
            return self._ref is None and p.grad is None
        return self._ref() is p.grad and p.grad._version == self._version


def _held(new: list[Tensor]) -> bool:
    """Whether any optimizer that exists holds one of these; looked for once, at a suspicion."""
    wanted = {id(q) for q in new}
    # type(x), as x.__class__ would wake lazy objects
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.optim.Optimizer)]
    return any(id(p) in wanted for x in found if hasattr(x, "param_groups") for p in _parameters(x))
