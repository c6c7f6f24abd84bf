"""Which parameters a conversion took out of a model or froze, and which came in their place.

So that an optimizer built before can be told apart. Neither side is kept alive, and no parameter
that stays in a model is referred to, not even weakly: torch then refuses to swap it
(``torch.__future__.set_swap_module_params_on_conversion``).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


class _Successors:
    """The parameters of a module that came, without those that were there before."""

    def __init__(self, module: nn.Module, old: set[int]) -> None:
        self._module = weakref.ref(module)
        self._stayed = {id(p) for p in module.parameters() if id(p) in old}

    def __iter__(self) -> Iterator[Tensor]:
        module = self._module()
        if module is not None:
            yield from (p for p in module.parameters() if id(p) not in self._stayed)


_new: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_frozen: weakref.WeakKeyDictionary[nn.Module, _Successors] = weakref.WeakKeyDictionary()
_conversions = 0


def note_replaced(old: list[nn.Parameter], new: nn.Module) -> None:
    """Remember that a layer with the parameters `old` gave way to `new`."""
    global _conversions
    came, stayed = _Successors(new, {id(p) for p in old}), {id(p) for p in new.parameters()}
    gone = [p for p in old if id(p) not in stayed]
    ids = {id(p) for p in gone}
    for earlier, between in list(_new.items()):
        if any(id(q) in ids for q in between):  # these came in its place, and die with their layer
            _new[earlier] = came
    for p in gone:
        _new[p] = came
        _conversions += 1


def note_frozen(layer: nn.Module, new: nn.Module) -> None:
    """Remember that `layer` stays, frozen, beside `new`, which is trained."""
    global _conversions
    _frozen[layer] = _Successors(new, set())
    _conversions += 1


def conversions() -> int:
    """How often parameters were replaced so far; 0 while none of those is alive."""
    return _conversions if _new.data or len(_frozen) else 0


def replaced(params: Iterable[Tensor]) -> list[Tensor]:
    """Those that a conversion took out of a model, or froze beside an adapter."""
    frozen = {id(p) for layer in list(_frozen) for p in layer.parameters() if not p.requires_grad}
    return [p for p in params if id(p) in frozen or p in _new]


def successors(old: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that came in the place of these and are alive, each once."""
    found: dict[int, Tensor] = {}
    ids = set()
    for p in old:
        ids.add(id(p))
        found.update({id(q): q for q in _new.get(p, ())})
    for layer, came in list(_frozen.items()):
        if any(id(p) in ids for p in layer.parameters()):
            found.update({id(q): q for q in came})
    return list(found.values())
