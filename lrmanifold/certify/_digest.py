"""A fingerprint of a model, by which a report that is out of date is noticed."""

from __future__ import annotations

import hashlib
import types
from typing import Any

import torch
from torch import Tensor, nn

from ._trace import HOOKS

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _mark(value: Any) -> str:
    """What of an attribute may change a forward; of objects of other kinds the type alone."""
    if isinstance(value, Tensor):
        raw = value.detach().as_subclass(Tensor).cpu().contiguous().flatten().view(torch.uint8)
        content = hashlib.blake2b(raw.numpy().tobytes(), digest_size=16).hexdigest()
        return f"{value.dtype} {tuple(value.shape)} {content}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_mark, value))}]"
    if isinstance(value, dict):
        return f"[{', '.join(sorted(f'{k!r}: {_mark(v)}' for k, v in value.items()))}]"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    # two lambdas may have one name
    number = id(value) if isinstance(value, types.FunctionType) else ""
    return f"{type(value)} {getattr(value, '__qualname__', '')} {number}"


def digest(model: nn.Module) -> str:
    """A fingerprint by which a stale report is noticed: tensors, attributes, hooks."""
    found = hashlib.blake2b(repr(model).encode(), digest_size=16)
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
        hooked = [k for k in HOOKS if vars(module).get(k)]
        found.update(f"{name} {_mark(own)} {hooked}".encode())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {_mark(value)}".encode())
    return found.hexdigest()
