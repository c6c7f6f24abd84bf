"""From a model to a file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._sealed import checksum
from ..parameter import is_sharded
from ._file import FORMAT, VERSION, CheckpointError, Payload, is_safetensors, write
from ._layers import checked, defect, low_rank_weights, not_finite, place_of

_GEOMETRY = ("m", "n", "rank", "tau", "centre", "gradient")


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    extra: Any = None,
) -> None:
    """Write a model, and what its training needs to go on, whole or not at all.

    Parameters
    ----------
    path : path
        A name ending in ``.safetensors`` gives a file of that format, which other programs read:
        its keys are those of ``model.state_dict()``. Any other name gives ``torch.save``'s, which
        ``torch.load(path, weights_only=True)`` reads.
    model : nn.Module
        Tensors that share their memory (tied weights) are written once. Of a compiled or DDP model
        the one inside is written.
    optimizer : torch.optim.Optimizer, optional
        Not in safetensors, which holds the model's tensors only.
    extra : tensors, numbers, words, lists and dicts of them, optional
        E.g. ``{"step": 10, "scheduler": scheduler.state_dict()}``; not in safetensors.

    Raises
    ------
    TypeError
        If the model is no module, or the optimizer no optimizer.
    ValueError
        For an optimizer or extra in safetensors.
    CheckpointError
        For what could not be loaded again, and would replace a good file: a weight off its
        manifold, NaN, Inf in a parameter, sparse, sharded and quantized tensors, in `extra` what
        could not be read without running code.
    """
    path, model, optimizer = checked(path, model, optimizer)
    if is_safetensors(path) and (optimizer is not None or extra is not None):
        word = "optimizer" if optimizer is not None else "extra"
        raise ValueError(f"{word} must be None for {path.name}: safetensors holds tensors only")
    write(path, make_payload(model, optimizer, extra))


def make_payload(model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: Any) -> Payload:
    """The checkpoint in memory, of tensors on the CPU."""
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key!r} must be a tensor, got {type(value).__name__}")
        reason = _unwritable(value)
        if reason is not None:
            raise CheckpointError(f"{key!r} {reason}")
        place = place_of(value)
        if place in seen:
            aliases[key] = seen[place]
            continue
        if place is not None:
            seen[place] = key
        state[key] = _plain_tensor(value)
    _check_values(model, state)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": state,
        "optimizer": None if optimizer is None else plain(optimizer.state_dict(), "optimizer"),
        "extra": plain(extra, "extra"),
        "aliases": aliases,
        "geometry": _geometry(model),
        "checksums": {key: checksum(value) for key, value in state.items()},
    }


def _unwritable(value: Tensor) -> str | None:
    """Why the values of a tensor cannot be written as they are; None if they can."""
    if is_sharded(value):
        return "is sharded over processes: use torch.distributed.checkpoint"
    if nn.parameter.is_lazy(value):
        return "has no values yet: run the model once, then save it"
    if value.is_meta:
        return "has no values: it is on the meta device"
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        return f"must be a dense tensor, got {kind}: convert it, or register it as not persistent"
    if value.is_quantized:
        return f"must be a dense tensor, got the quantized type {value.dtype}"
    return None


def _plain_tensor(value: Tensor) -> Tensor:
    """A contiguous copy of torch's own class, on the CPU.

    geoopt's subclass would need its code to be read again; a view would be written with all of its
    storage.
    """
    copied = value.detach().as_subclass(torch.Tensor).to("cpu", copy=True)
    return copied.resolve_conj().resolve_neg().contiguous()


def _check_values(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse values that :func:`lrmanifold.checkpoint.load` would refuse."""
    layers, parameters = low_rank_weights(model), {name for name, _ in model.named_parameters()}
    for key, value in state.items():
        reason = not_finite(value, parameter=key in parameters)
        if reason is not None:
            raise CheckpointError(f"{key!r} {reason}")
        if key in layers:
            reason = defect(layers[key], value)
            if reason is not None:
                raise CheckpointError(
                    f"{key!r} is not a point of {layers[key].manifold}: {reason}. If it was "
                    "averaged, take lrmanifold.optim.retracting_average; to bring it back: "
                    "p.data.copy_(p.manifold.projx(p))"
                )


# What ``weights_only=True`` reads; subclasses need their code.
_READABLE = (type(None), bool, int, float, complex, str, bytes, torch.Size)


def plain(value: Any, where: str) -> Any:
    """The same with every tensor as a plain one; what could not be read again is refused now."""
    if isinstance(value, Tensor):
        reason = _unwritable(value)
        if reason is not None:
            raise CheckpointError(f"{where} {reason}")
        return _plain_tensor(value)
    if isinstance(value, Mapping):
        for key in value:
            _check_key(key, f"the key {key!r} of {where}")
        # a Counter, as MultiStepLR has it, is read as one
        kind = Counter if type(value) is Counter else dict
        return kind({key: plain(item, f"{where}[{key!r}]") for key, item in value.items()})
    if type(value) in (list, tuple):
        return type(value)(plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(value) not in _READABLE:
        _refuse(where, value)
    return value


def _check_key(key: Any, where: str) -> None:
    for part in key if type(key) is tuple else ():
        _check_key(part, where)
    if type(key) not in (*_READABLE, tuple):
        _refuse(where, key)


def _refuse(where: str, value: Any) -> None:
    raise CheckpointError(
        f"{where} must be a tensor, a number, a word or lists and dicts of them, to be read "
        f"without running code, got {type(value).__name__}"
    )


def _geometry(model: nn.Module) -> dict[str, dict[str, Any]]:
    found = {}
    for key, layer in low_rank_weights(model).items():
        known = {name: getattr(layer.manifold, name, None) for name in _GEOMETRY}
        retraction = layer.manifold.retraction
        known["retraction"] = retraction if isinstance(retraction, str) else None
        found[key] = known
    return found
