"""Who reads the ``weight`` of another layer directly, found in the code that would do it.

A module whose forward takes ``self.proj.weight`` instead of calling ``self.proj`` (torch's
attention, Swin's windows) expects a dense matrix there, and one that takes ``self.proj.factors`` a
low-rank layer. What is found here stays what it is.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .layer import LowRankLayer

# Names and constant indices one after another, as ``layers``, 0, ``weight``.
Chain = tuple[str | int, ...]

# Of the weight these do not depend on its values: T5 compares dtypes, say.
_HARMLESS = frozenset({"dtype", "device", "requires_grad", "is_cuda", "is_meta", "data_ptr"})
_LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD"})
_CONSTANTS = frozenset({"LOAD_CONST", "LOAD_SMALL_INT"})
# Their fused path is switched off where their layers are low-rank; see `replace`.
_HANDLED: tuple[type[nn.Module], ...] = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
# What modules of torch have, too, so that code which reads it goes on after a conversion.
_TORCHS = frozenset(dir(nn.Linear(1, 1, device="meta"))).union(
    dir(nn.MultiheadAttention(1, 1, device="meta"))
)


def readers(model: nn.Module) -> dict[int, str]:
    """Ids of modules that a forward pass or a hook reads directly: who does, and what it reads."""
    found: dict[int, str] = {}
    for module in model.modules():
        by_hooks = itertools.chain.from_iterable(_read_by_hook(h, module) for h in hooks(module))
        for key, reading in itertools.chain(by_hooks, _read_by(module, "forward", "__call__")):
            found.setdefault(key, reading)
    return found


def _read_by(module: nn.Module, *methods: str) -> Iterator[tuple[int, str]]:
    """What these methods of a module read, and what they call, of this module and of others."""
    waiting: list[tuple[nn.Module, str, int]] = [(module, name, 0) for name in methods]
    seen: set[tuple[int, str, int]] = set()
    while waiting:
        owner, name, start = waiting.pop()
        if (id(owner), name, start) in seen:
            continue
        seen.add((id(owner), name, start))
        chains, above = _method(type(owner), name, start)  # type: ignore[arg-type]
        waiting += [(owner, key, place) for key, place in above]
        for chain in chains:
            for target, rest in _along(owner, chain):
                waiting.append((target, str(rest[0]), 0))
                if target is not owner and (what := _what_is_read(target, rest)):
                    yield id(target), f"{_class_name(type(owner))} reads its {what} directly"


def _read_by_hook(hook: Any, module: nn.Module) -> Iterator[tuple[int, str]]:
    given: list[Any] = [module]
    while isinstance(hook, functools.partial):
        given, hook = [*hook.args, *given], hook.func
    if not inspect.isfunction(hook):
        owner, hook = getattr(hook, "__self__", hook), getattr(hook, "__func__", hook)
        if not inspect.isfunction(hook):
            hook = inspect.getattr_static(type(hook), "__call__", None)
        if isinstance(owner, nn.Module):
            yield from _read_by(owner, getattr(hook, "__name__", ""))
        given = [owner, *given]
    code = _code(hook)
    if code is None:
        return
    seen = {**_modules_around(hook, code), **dict(zip(code.co_varnames, given, strict=False))}
    chains = [(name, chain) for name in seen for chain in _chains(code, name)]
    for name, chain in chains:
        for target, rest in _along(seen[name], chain):
            if what := _what_is_read(target, rest):
                yield id(target), f"a hook reads its {what} directly"
    if "weight" in _names(code) and not any("weight" in chain for _, chain in chains):
        # in a way that is not followed, a loop say: any layer that the hook can reach
        for root in seen.values():
            for layer in root.modules() if isinstance(root, nn.Module) else ():
                yield id(layer), "a hook reads its weight directly"


def _modules_around(function: Any, code: types.CodeType) -> dict[str, nn.Module]:
    """Global variables and those of a function around it that are modules."""
    function = inspect.unwrap(function)
    known = getattr(function, "__globals__", {})
    found = {name: known[name] for name in sorted(_names(code)) if name in known}
    cells = getattr(function, "__closure__", None) or ()
    for name, cell in zip(code.co_freevars, cells, strict=False):
        with contextlib.suppress(ValueError):  # no value yet
            found[name] = cell.cell_contents
    return {name: value for name, value in found.items() if isinstance(value, nn.Module)}


def _along(start: Any, chain: Chain) -> Iterator[tuple[nn.Module, Chain]]:
    """The modules that a chain passes, each with what is asked of it; up to the first one read."""
    holder: Any = start
    for i in range(len(chain)):
        rest = chain[i:]
        if isinstance(holder, nn.Module):
            yield holder, rest
            if holder is not start and _what_is_read(holder, rest):
                return
        holder = _step(holder, rest)


def _step(holder: Any, rest: Chain) -> Any:
    """What ``holder.a`` or ``holder[0]`` is; None where to find out could change something."""
    key = rest[0]
    if isinstance(key, int):
        sequence = isinstance(holder, (list, tuple, nn.Sequential, nn.ModuleList))
        return holder[key] if sequence and -len(holder) <= key < len(holder) else None
    static = inspect.getattr_static(type(holder), key, None)
    if isinstance(static, functools.cached_property):
        return vars(holder).get(key)
    # a property runs code: ask only where a weight may come after it
    if isinstance(static, property) and _WATCHED.isdisjoint(rest[1:]):
        return None
    try:
        return getattr(holder, key, None)
    except Exception:  # of the property, which nothing here depends on
        return None


def _what_is_read(target: nn.Module, rest: Chain) -> str:
    """The name asked of a module if the answer is another one after a conversion; or ""."""
    if rest[0] == "weight":
        return "" if _HARMLESS.intersection(rest[1:2]) else "weight"
    return str(rest[0]) if rest[0] in _own_names(type(target)) else ""  # type: ignore[arg-type]


@functools.lru_cache(maxsize=1024)
def _own_names(kind: type) -> frozenset[str]:
    """What a layer of this library has and torch's has not."""
    if not any(k.__module__.startswith(f"{__package__}.") for k in kind.__mro__):
        return frozenset()
    return frozenset(dir(kind)).union(getattr(kind, "inner_parts", ())) - _TORCHS


# After a property these make it worth asking what the property gives.
_WATCHED = _own_names(LowRankLayer) | {"weight"}


def _class_name(kind: type) -> str:
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__


@functools.lru_cache(maxsize=4096)
def _method(
    kind: type[nn.Module], name: str, start: int
) -> tuple[tuple[Chain, ...], tuple[tuple[str, int], ...]]:
    """The chains of a method or property, and what it may call by ``super()``.

    Of the classes in the order of resolution, those from `start` on are looked at.
    """
    classes = [k for k in kind.__mro__ if k not in (*_HANDLED, nn.Module, object)]
    place = next((i for i in range(start, len(classes)) if name in vars(classes[i])), None)
    code = None if place is None else _code(vars(classes[place])[name])
    if place is None or code is None:
        return (), ()
    names, above = _names(code), {k.__name__ for k in classes[place + 1 :]}
    inherited = sorted(names) if names & {"super", *above} else ()
    chains = dict.fromkeys(_chains(code, *code.co_varnames[:1]))
    return tuple(chains), tuple((n, place + 1) for n in inherited)


def _chains(code: types.CodeType, this: str = "") -> Iterator[Chain]:
    """What is asked of the variable `this`, as a.b of ``this.a.b``, in inner functions, too.

    A local name for ``this.a`` is followed; a loop over it is not.
    """
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType) and this in (*inner.co_freevars, *inner.co_names):
            yield from _chains(inner, this)
    known: dict[str, Chain] = {this: ()}
    chain: Chain | None = None
    index: str | int | None = None
    asked = False  # isinstance(this.a.weight, Tensor) has the same answer after a conversion
    for step in dis.get_instructions(code):
        op, value = step.opname, step.argval
        if op in ("EXTENDED_ARG", "NOP", "CACHE", "PUSH_NULL"):
            continue
        names = value if isinstance(value, tuple) else (value,)
        before, key = chain, index
        chain = index = None
        if op.startswith("LOAD_FAST") or op in ("LOAD_DEREF", "LOAD_GLOBAL"):
            chain = known.get(names[-1])
        elif op.startswith("STORE_FAST"):
            known.pop(names[0], None)
            if before is not None and key is None:
                known[names[0]] = before
            if "LOAD" in op:  # two instructions in one
                chain = known.get(names[-1])
        elif before is not None and op in _LOADS:
            chain = (*before, str(value))
            continue
        elif before is not None and op in _CONSTANTS and type(value) in (int, str):
            chain, index = before, value
            continue
        elif key is not None and before is not None and _takes_an_item(step):
            chain = (*before, key)
            continue
        if before and not asked:
            yield before
        if chain is None:
            asked = op == "LOAD_GLOBAL" and value == "isinstance"


def _takes_an_item(step: dis.Instruction) -> bool:
    return step.opname == "BINARY_SUBSCR" or step.argrepr == "[]"  # until Python 3.13, and later


def hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """What runs before and after a module's forward and backward pass."""
    for key in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    ):
        yield from module.__dict__.get(key, {}).values()


def _code(function: Any) -> types.CodeType | None:
    """Of a function, or of the one in a method, a property, a cached property or a partial."""
    for inner in ("__func__", "fget", "func"):
        function = getattr(function, inner, None) or function
    if not callable(function):
        return None
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def _names(code: types.CodeType) -> set[str]:
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*(_names(c) for c in inner))
