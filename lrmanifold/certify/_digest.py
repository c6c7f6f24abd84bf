"""A fingerprint of a model, by which a report that is out of date is noticed."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import types
from typing import Any

import torch
from torch import Tensor, nn

from ._trace import HOOKS

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


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
    if isinstance(value, functools.partial):
        return f"partial {_mark([value.func, value.args, value.keywords])}"
    if isinstance(value, _NAMESPACES) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return f"{type(value)} {_mark(getattr(value, '__dict__', None))}"
    # two lambdas may have one name
    number = id(value) if isinstance(value, types.FunctionType) else ""
    return f"{type(value)} {getattr(value, '__qualname__', '')} {number}"


def _in_class(value: Any) -> Any:
    """A function of a class by its code: a report may be read by another process."""
    value = getattr(value, "fget", getattr(value, "__func__", value))
    if not isinstance(value, types.FunctionType):
        return value
    code = value.__code__
    place = (value.__module__, value.__qualname__, code.co_firstlineno)
    return [*place, code.co_code.hex(), code.co_consts, value.__defaults__]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Its own, and those of its classes with their methods, up to nn.Module."""
    own = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
    classes = type(module).__mro__
    for cls in classes[: classes.index(nn.Module)]:
        # copying and pickling write __slotnames__ into a class
        own = {k: _in_class(v) for k, v in vars(cls).items() if not k.startswith("__")} | own
    return own


def digest(model: nn.Module) -> str:
    """A fingerprint by which a stale report is noticed: tensors, attributes, hooks."""
    found = hashlib.blake2b(repr(model).encode(), digest_size=16)
    # shared ones under each of their names: which are shared may change
    for name, module in model.named_modules(remove_duplicate=False):
        hooked = [k for k in HOOKS if vars(module).get(k)]
        found.update(f"{name} {_mark(_attributes(module))} {hooked}".encode())
    for name, value in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        found.update(f"{name} {_mark(value)}".encode())
    return found.hexdigest()
