"""Which parameters a conversion took out of a model, and which came in their place.

So that an optimizer built before can be told apart. Neither side is kept alive.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

_new: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_conversions = 0


def note_replaced(old: Iterable[Tensor], new: Iterable[Tensor]) -> None:
    """Remember that a layer with the parameters `old` gave way to one with the parameters `new`."""
    global _conversions
    before = {id(p): p for p in old}
    after = {id(p): p for p in new}
    came = [TensorWeakRef(p) for key, p in after.items() if key not in before]
    for key, p in before.items():
        if key not in after:
            _new[p] = came
            _conversions += 1


def conversions() -> int:
    """How often parameters were replaced so far; 0 while none of those is alive."""
    return _conversions if _new.data else 0


def was_replaced(p: Tensor) -> bool:
    """Whether a conversion took `p` out of a model, or froze it beside an adapter."""
    return p in _new


def successors(p: Tensor) -> list[Tensor]:
    """The parameters that came in the place of `p` and are alive."""
    found = (ref() for ref in _new.get(p, ()))
    return [q for q in found if q is not None]
