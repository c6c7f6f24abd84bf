"""Who reads the ``weight`` of another layer directly, found in the code that would do it.

A module whose forward takes ``self.proj.weight`` instead of calling ``self.proj`` (torch's
attention, Swin's windows) expects a dense matrix there. What is found here stays dense.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

# Of the weight these do not depend on its values: T5 compares dtypes, say.
_HARMLESS = frozenset({"dtype", "device", "requires_grad", "is_cuda", "is_meta", "data_ptr"})
_LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
# Its fused path is switched off where its layers are low-rank; see `replace`.
_HANDLED: tuple[type[nn.Module], ...] = (nn.TransformerEncoderLayer,)


def readers(model: nn.Module) -> dict[int, str]:
    """Ids of modules whose weight a forward pass or a hook reads, and who it is."""
    found: dict[int, str] = {}
    for module in model.modules():
        if any(_reads_weight(hook) for hook in hooks(module)):
            found[id(module)] = "a hook"
        if isinstance(module, _HANDLED):
            continue
        for path in _paths(type(module)):  # type: ignore[arg-type]
            try:
                target: Any = functools.reduce(getattr, path, module)
            except AttributeError:
                continue
            if isinstance(target, nn.Module) and target is not module:
                found[id(target)] = _class_name(type(module))
    return found


def _class_name(kind: type) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__


@functools.lru_cache(maxsize=1024)
def _paths(kind: type[nn.Module]) -> frozenset[tuple[str, ...]]:
    """Attribute paths p such that ``self.p.weight`` is read in `forward` or a method it calls."""
    seen: set[str] = set()
    waiting = ["forward"]
    found: set[tuple[str, ...]] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        method = inspect.getattr_static(kind, name, None)
        code = _code(getattr(method, "__func__", method))
        if code is None or getattr(nn.Module, name, None) is method:
            continue
        for chain in _chains(code):
            waiting.append(chain[0])
            found.update(
                chain[:i]
                for i in range(1, len(chain))
                if chain[i] == "weight" and not _HARMLESS.intersection(chain[i + 1 : i + 2])
            )
    return frozenset(found)


def _chains(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """The attributes in each ``self.a.b.c`` of a method."""
    if not code.co_varnames:
        return
    this = code.co_varnames[0]
    chain: list[str] | None = None
    for step in dis.get_instructions(code):
        loaded = step.argval if step.opname.startswith("LOAD_FAST") else None
        if loaded == this or (isinstance(loaded, tuple) and loaded[-1] == this):
            if chain:
                yield tuple(chain)
            chain = []
        elif step.opname in _LOADS and chain is not None:
            chain.append(str(step.argval))
        else:
            if chain:
                yield tuple(chain)
            chain = None
    if chain:
        yield tuple(chain)


def hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """What runs before and after a module's forward and backward pass."""
    for key in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    ):
        yield from module.__dict__.get(key, {}).values()


def _reads_weight(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    if inspect.ismethod(hook):
        hook = hook.__func__
    elif not inspect.isfunction(hook):
        hook = inspect.getattr_static(type(hook), "__call__", None)
    code = _code(hook)
    return code is not None and "weight" in _names(code)


def _code(function: Any) -> types.CodeType | None:
    if not callable(function):
        return None
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def _names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*(_names(c) for c in inner))
