"""Why a layer cannot be replaced by another one: reasons to leave it alone, found beforehand."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._arguments import check_instance, check_module
from ..precision import STORAGE_DTYPES
from ._readers import hooks, readers
from ._ties import ties

# What is registered is no second reference, nor what a low-rank layer remembers of its own weight.
_REGISTERED = frozenset({"_modules", "_parameters", "_buffers", "_own_weight"})


def check_model(name: str, model: Any) -> nn.Module:
    """`model`, a module whose layers may be replaced.

    Raises
    ------
    TypeError
        If it is no module.
    ValueError
        If something has already taken hold of the parameters: wrappers for many processes, or
        TorchScript.
    """
    model = check_module(name, model)
    wrappers = (nn.parallel.DistributedDataParallel, torch.jit.ScriptModule)
    for prefix, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, wrappers[:1]) or "FullyShardedDataParallel" in kind:
            raise ValueError(
                f"{name} must not be wrapped yet, got a {kind}{_at(prefix)}, which holds the "
                "parameters that it was given: convert the model inside first, then wrap it"
            )
    if isinstance(model, wrappers[1]):
        raise ValueError(
            f"{name} must be an ordinary module, got a {type(model).__name__}, whose code is "
            "fixed: convert the model first, then script it"
        )
    return model


def _at(name: str) -> str:
    return f" at {name!r}" if name else ""


def check_dense(name: str, module: Any, kind: type[nn.Module]) -> Any:
    """`module`, one of torch's dense layers with a real weight; of the weight only values count."""
    check_instance(name, module, kind, f"a {kind.__name__}")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"{name} must have a weight, got a lazy one: run a batch through it first")
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name} must have a weight, got one without")
    if weight.dtype not in STORAGE_DTYPES or weight.layout is not torch.strided:
        raise TypeError(
            f"{name} must have a real, dense weight of 16 bits or more, got {weight.dtype}, "
            f"{weight.layout}: low-rank layers are not complex, quantized or sparse"
        )
    return module


class Obstacles:
    """What stands in the way of replacing layers of one model; made before anything is changed."""

    def __init__(self, model: nn.Module) -> None:
        self.ties = ties(model)
        self._readers = readers(model)
        self._compiled = set(_compiled(model))
        self._held = dict(_held_elsewhere(model))

    def of(self, module: nn.Module) -> str:
        """The reason to leave `module` alone, in words; "" if there is none.

        For layers of any kind: what does not depend on whether it is dense or low-rank.
        """
        own = vars(module)
        if "forward" in own:
            return "its forward was replaced on the object"
        if own.get("_compiled_call_impl") is not None or id(module) in self._compiled:
            return "it is compiled: convert first, then compile"
        if parametrize.is_parametrized(module):
            return _parametrized(module)
        if reading := self._readers.get(id(module)):
            return reading
        if place := self._held.get(id(module)):
            return f"{place} refers to it too, outside of the module tree"
        return ""

    def of_weight(self, weight: Tensor | None) -> str:
        """The reason to keep this very tensor: what hangs on it, and who holds it; or ""."""
        if weight is None:
            return ""
        if place := self._held.get(id(weight)):
            return f"{place} refers to its weight too, outside of the module tree"
        if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
            return "its weight has hooks: remove them, and register them on the new one"
        tensors = [key for key, value in vars(weight).items() if isinstance(value, Tensor)]
        return f"its weight has tensors as attributes: {listed(tensors)}" if tensors else ""

    def of_dense(self, module: nn.Module, kind: type[nn.Module], *, tied: bool = False) -> str:
        """The same for a layer that is to become low-rank; `kind` is torch's class.

        With `tied`, a weight that others have, too, is no obstacle.
        """
        reason = self.of(module) or dense_defect(module, kind)
        reason = reason or self.of_weight(module._parameters["weight"])
        if not reason and not tied and (others := self.ties.get((id(module), "weight"))):
            reason = f"its weight is tied to {listed(others)}"
        return reason

    def of_attention(self, module: nn.MultiheadAttention) -> str:
        """The same for torch's attention, whose output projection is part of it."""
        out: Any = module.out_proj
        if type(module) is not nn.MultiheadAttention:
            return f"a subclass of attention ({type(module).__name__})"
        if reason := self.of(module):
            return reason
        own = vars(out)
        if type(out) not in _PROJECTIONS or "forward" in own or has_hooks(out):
            return "its out_proj has hooks or a forward of its own, which torch does not run"
        names = [k for k in ATTENTION_WEIGHTS if getattr(module, k, None) is not None]
        for place, key in [*((module, k) for k in names), (out, "weight")]:
            weight = place._parameters.get(key)
            if reason := weight_defect(weight) or self.of_weight(weight):
                return reason
            if others := self.ties.get((id(place), key)):
                return f"its {key} is tied to {listed(others)}"
        return ""


#: Under these names torch's attention keeps what it does to query, key and value.
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_PROJECTIONS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def has_whole_weights(module: nn.MultiheadAttention) -> bool:
    """Whether no weight of an attention is computed (by pruning, say)."""
    own = module._parameters
    given = own.get("in_proj_weight") is not None or all(
        own.get(k) is not None for k in ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    )
    out = getattr(module, "out_proj", None)
    return given and isinstance(out, nn.Linear) and out._parameters.get("weight") is not None


def has_hooks(module: nn.Module) -> bool:
    """Whether anything runs with the module's forward or backward pass."""
    return any(True for _ in hooks(module))


def dense_defect(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why a dense layer, seen by itself, is not just torch's layer with a plain weight; or ""."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: run a batch through the model first"
    if parametrize.is_parametrized(module):
        return _parametrized(module)
    if type(module) is not kind:
        name = type(module).__name__
        if getattr(type(module), "forward", None) is kind.forward:
            return f"a subclass ({name}), which may have more to it than a {kind.__name__}"
        return f"a subclass ({name}) with a forward of its own"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a hook (weight_norm, prune, ...)"
    return weight_defect(weight) or embedding_defect(module)


def embedding_defect(module: Any) -> str:
    """Why a table of embeddings cannot become low-rank, by its options; "" for other layers."""
    if not isinstance(module, nn.Embedding):
        return ""
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} rewrites rows of the table"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq=True scales gradients of rows"
    return "sparse=True: the factors have dense gradients" if module.sparse else ""


def _parametrized(module: nn.Module) -> str:
    names = ", ".join(module.parametrizations)  # type: ignore[arg-type, union-attr]
    return f"parametrized: its {names} is computed anew at each use"


def weight_defect(weight: Any) -> str:
    """Why a dense weight cannot become low-rank, by its type alone; or ""."""
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if weight.layout is not torch.strided:
        return f"its weight is sparse ({weight.layout})"
    if weight.dtype not in STORAGE_DTYPES:
        return f"its weight is {weight.dtype}: low-rank layers are real, 16 bits or wider"
    return ""


def listed(names: Iterable[str], most: int = 3) -> str:
    """Names in quotes, the first few of many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(n) for n in names[:most]) + more


def _compiled(model: nn.Module) -> Iterator[int]:
    """Modules that a torch.compile'd wrapper around them calls: it would go on with the old one."""
    for module in model.modules():
        inner = dict(module.named_children()).get("_orig_mod")
        if inner is not None:
            yield id(inner)


def _held_elsewhere(model: nn.Module) -> Iterator[tuple[int, str]]:
    """Layers and weights in containers or functions of a module, which would keep the old ones."""
    for name, parent in model.named_modules():
        for key, value in vars(parent).items():
            if key in _REGISTERED or key.endswith("_hooks"):
                continue
            for part in _parts_in(value, 2):
                if part is not parent:
                    yield id(part), f"{type(parent).__name__}.{key}{_at(name)}"


def _parts_in(value: Any, depth: int) -> Iterator[nn.Module | nn.Parameter]:
    if isinstance(value, (nn.Module, nn.Parameter)):
        yield value
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _parts_in(item, depth - 1)
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from _parts_in(item, depth - 1)
    elif depth and isinstance(value, functools.partial):
        yield from _parts_in((value.func, *value.args, *value.keywords.values()), depth)
    elif depth and isinstance(value, types.MethodType):
        yield from _parts_in(value.__self__, depth - 1)
    elif depth and isinstance(value, types.FunctionType):
        yield from _parts_in(tuple(_captured(value)), depth)
    elif depth and isinstance(value, types.SimpleNamespace):
        yield from _parts_in(vars(value), depth)


def _captured(function: types.FunctionType) -> Iterator[Any]:
    """What a function keeps: its defaults, and the variables around it that have a value."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
