"""A fingerprint of a model, by which a report that is out of date is noticed."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import hashlib
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._trace import HOOKS

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_EMPTY = types.CellType()


def _mark(value: Any, inside: frozenset[int] = frozenset()) -> str:
    """What of an attribute may change a forward; of objects of other kinds the type alone.

    Without addresses: a report may be read by another process. `inside`: what is being looked at.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, enum.Enum)):
        return repr(value)
    if isinstance(value, Tensor):
        raw = value.detach().as_subclass(Tensor).cpu().contiguous().flatten().view(torch.uint8)
        return f"{value.dtype} {tuple(value.shape)} {_hash(raw.numpy().tobytes())}"
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        return f"{value.dtype} {value.shape} {_hash(value.tobytes())}"
    if id(value) in inside:
        return "itself"

    def mark(part: Any) -> str:
        return _mark(part, inside | {id(value)})

    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(mark, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(mark, value)))}}}"
    if isinstance(value, dict):
        return f"[{', '.join(sorted(f'{k!r}: {mark(v)}' for k, v in value.items()))}]"
    if isinstance(value, functools.partial):
        return f"partial {mark([value.func, value.args, value.keywords])}"
    if isinstance(value, _NAMESPACES) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        return f"{type(value)} {mark(getattr(value, '__dict__', None))}"
    if isinstance(value, types.FunctionType):
        code = value.__code__
        place = [value.__module__, value.__qualname__, code.co_firstlineno, code]
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        return mark([*place, value.__defaults__, value.__kwdefaults__, cells])
    if isinstance(value, types.CodeType):
        # with its names: tanh(x) and neg(x) are the same bytecode
        return f"{value.co_code.hex()} {value.co_names} {value.co_freevars} {mark(value.co_consts)}"
    return f"{type(value)} {getattr(value, '__qualname__', '')}"


def _hash(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def _in_class(value: Any) -> Any:
    """What of a class's entry computes: of properties and class methods the function."""
    return getattr(value, "fget", getattr(value, "__func__", value))


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
