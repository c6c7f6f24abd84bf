"""From a model to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._file import FORMAT, VERSION, CheckpointError, Payload, checksum, is_safetensors, write
from ._layers import low_rank_weights

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
        Tensors that share their memory (tied weights) are written once.
    optimizer : torch.optim.Optimizer, optional
        Not in safetensors, which holds the model's tensors only.
    extra : tensors, numbers, words, lists and dicts of them, optional
        E.g. ``{"step": 10, "scheduler": scheduler.state_dict()}``; not in safetensors.

    Raises
    ------
    ValueError
        For an optimizer or extra in safetensors.
    CheckpointError
        If `extra` or a state holds what could not be read again without running code.
    """
    path = Path(path)
    if is_safetensors(path) and (optimizer is not None or extra is not None):
        word = "optimizer" if optimizer is not None else "extra"
        raise ValueError(f"{word} must be None for {path.name}: safetensors holds tensors only")
    payload = make_payload(model, optimizer, extra)
    _check_plain("extra", payload["extra"])
    _check_plain("optimizer", payload["optimizer"])
    write(path, payload)


def make_payload(model: nn.Module, optimizer: torch.optim.Optimizer | None, extra: Any) -> Payload:
    """The checkpoint in memory, of tensors on the CPU."""
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key!r} must be a tensor, got {type(value).__name__}")
        if value.is_meta:
            raise CheckpointError(f"{key!r} has no values: it is on the meta device")
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and place in seen:
            aliases[key] = seen[place]
            continue
        seen[place] = key
        state[key] = plain(value)
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": state,
        "optimizer": None if optimizer is None else plain(optimizer.state_dict()),
        "extra": plain(extra),
        "aliases": aliases,
        "geometry": _geometry(model),
        "checksums": {key: checksum(value) for key, value in state.items()},
    }


def plain(value: Any) -> Any:
    """The same with every tensor as a contiguous one of torch's own class, on the CPU.

    geoopt's subclass would need its code to be read again; a view would be written with all of its
    storage.
    """
    if isinstance(value, Tensor):
        return value.detach().as_subclass(torch.Tensor).to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value


def _check_plain(where: str, value: Any) -> None:
    """Refuse what ``weights_only=True`` would not read: better now than when it is needed."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(f"{where}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_plain(f"{where}[{i}]", item)
    elif value is not None and type(value) not in (Tensor, bool, int, float, complex, str, bytes):
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
