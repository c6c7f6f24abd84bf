"""Which tensors of a model share memory: one Parameter in two places, or two over one storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..parameter import is_sharded

# What holds a tensor: the id of its module, and its name there.
Place = tuple[int, str]


def ties(model: nn.Module) -> dict[Place, list[str]]:
    """For each parameter and buffer that shares memory, the qualified names of the others.

    Memory is compared by address, so that views of one tensor count as tied, and tensors that
    merely lie beside each other in one flat buffer do not.
    """
    found: dict[Place, list[str]] = {}
    for group in _groups(model):
        for module, name, _ in group:
            others = [full for m, n, full in group if (m, n) != (module, name)]
            if others:
                found[module, name] = others
    return found


def _groups(model: nn.Module) -> Iterator[list[tuple[int, str, str]]]:
    """Runs of overlapping address ranges, each as (id of the module, name there, full name)."""
    entries: list[tuple[Any, int, int, tuple[int, str, str]]] = []
    for prefix, module in model.named_modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if isinstance(tensor, Tensor):
                full = f"{prefix}.{name}" if prefix else name
                space, start, stop = _extent(tensor)
                entries.append((space, start, stop, (id(module), name, full)))
    entries.sort(key=lambda e: e[:3])
    group: list[tuple[int, str, str]] = []
    last: Any = None
    end = 0
    for space, start, stop, entry in entries:
        if group and space == last and start < end:
            end = max(end, stop)
            group.append(entry)
            continue
        if group:
            yield group
        group, last, end = [entry], space, stop
    if group:
        yield group


def _extent(t: Tensor) -> tuple[tuple[str, int], int, int]:
    """Address space, first byte and the byte after the last; for odd tensors their identity."""
    by_identity = (("object", id(t)), 0, 1)
    if is_sharded(t):
        return by_identity
    try:
        size = 1 + sum((int(n) - 1) * int(s) for n, s in zip(t.shape, t.stride(), strict=True))
        if not t.numel():
            return by_identity
        address = t.data_ptr()
        if address:
            return (str(t.device), 0), address, address + size * t.element_size()
        # On the meta device all addresses are 0: there the storage itself tells.
        start = int(t.storage_offset()) * t.element_size()
        space = ("storage", int(t.untyped_storage()._cdata))
        return space, start, start + size * t.element_size()
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return by_identity  # sparse, quantized, lazy, a wrapper: no address
