"""The two file formats, their version, and the checksums that name a damaged tensor."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_atomically

FORMAT = "lrmanifold checkpoint"
VERSION = 2
_SUFFIX = ".safetensors"
_KEY = "lrmanifold"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, from a newer version, or does not fit the model."""


Payload = dict[str, Any]
"""A checkpoint in memory.

``model``: state dict of plain tensors. ``optimizer``: state dict or None. ``extra``: the caller's.
``aliases``: keys whose tensor is another key's. ``geometry``: what each low-rank weight is, by key.
``checksums``: of each tensor of ``model``, by key. ``format``, ``version``.
"""


def is_safetensors(path: Path) -> bool:
    """Whether the name of a file asks for safetensors."""
    return path.suffix == _SUFFIX


def checksum(x: Tensor) -> int:
    """CRC-32 of the bytes of a tensor."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    values: Any = flat.view(torch.uint8).numpy()
    return zlib.crc32(values) if flat.numel() else 0


def write(path: Path, payload: Payload) -> None:
    """Write a payload in the format that the name of the file asks for."""
    if is_safetensors(path):
        packing = _safetensors()
        header = {k: v for k, v in payload.items() if k not in ("model", "optimizer", "extra")}
        metadata = {"format": "pt", _KEY: json.dumps(header)}
        write_atomically(path, packing.save(payload["model"], metadata=metadata))
        return
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    write_atomically(path, buffer.getvalue())


def read(path: Path) -> Payload:
    """Read a payload of the present version; older ones are brought to it.

    Raises
    ------
    CheckpointError
        If there is no such file, it is damaged, or of a newer version.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    raw = _read_safetensors(path) if is_safetensors(path) else _read_torch(path)
    if raw.get("format") != FORMAT:
        raw = _plain_state_dict(path, raw)
    return _verified(path, _migrated(path, raw))


def _read_safetensors(path: Path) -> Payload:
    packing = _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = packing.load_file(path)
        header = json.loads(metadata.get(_KEY, "{}"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is damaged, or no safetensors file ({error})") from error
    if not header:
        return tensors
    return {**header, "model": tensors, "optimizer": None, "extra": None}


def _read_torch(path: Path) -> Payload:
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle raise what they please
        # not torch's own words: they advise to read it without weights_only
        raise CheckpointError(
            f"{path}: is damaged, or holds more than tensors, numbers and words"
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a dict, got {type(raw).__name__}")
    return raw


def _plain_state_dict(path: Path, raw: Mapping[str, Any]) -> Payload:
    """A file without our header is version 0: the state dict itself."""
    strange = next((k for k, v in raw.items() if not isinstance(v, Tensor)), None)
    if strange is not None:
        raise CheckpointError(
            f"{path}: is neither a checkpoint of this library nor a state dict: {strange!r} must "
            f"be a tensor, got {type(raw[strange]).__name__}"
        )
    # torch's own versions of the modules, for their own migrations.
    metadata = getattr(raw, "_metadata", None)
    return {"format": FORMAT, "version": 0, "model": dict(raw), "metadata": metadata}


def _from_0(payload: Payload) -> Payload:
    """Plain state dicts: nothing is known beside the tensors."""
    empty: Payload = {"optimizer": None, "extra": None}
    known: Payload = {"aliases": {}, "geometry": {}, "checksums": {}, "channels_first": False}
    return {**empty, **known, **payload}


def _from_1(payload: Payload) -> Payload:
    """Low-rank convolutions had their channels first in V; the model knows how many."""
    return {"channels_first": True, **payload}


# What brings a payload of a version to the next one.
MIGRATIONS: dict[int, Callable[[Payload], Payload]] = {0: _from_0, 1: _from_1}


def _migrated(path: Path, payload: Payload) -> Payload:
    version = payload.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise CheckpointError(f"{path}: version must be an integer >= 0, got {version!r}")
    if version > VERSION:
        raise CheckpointError(
            f"{path}: has version {version}, this library reads up to {VERSION}: update it"
        )
    for old in range(version, VERSION):
        payload = {**MIGRATIONS[old](payload), "version": old + 1}
    return payload


def _verified(path: Path, payload: Payload) -> Payload:
    """Check the header and every checksum; put the aliases back."""
    for key in ("model", "aliases", "geometry", "checksums"):
        if not isinstance(payload.get(key), dict):
            raise CheckpointError(f"{path}: {key!r} must be a dict, got {payload.get(key)!r:.60}")
    state = payload["model"]
    for key, known in payload["checksums"].items():
        if key not in state:
            raise CheckpointError(f"{path}: is damaged: the tensor {key!r} is missing")
        if checksum(state[key]) != known:
            raise CheckpointError(
                f"{path}: is damaged: the values of {key!r} are not those that were saved"
            )
    for key, source in payload["aliases"].items():
        if source not in state:
            raise CheckpointError(f"{path}: is damaged: {source!r}, shared by {key!r}, is missing")
        state[key] = state[source]
    return payload


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "files named .safetensors need the package safetensors: pip install safetensors"
        ) from error
    return safetensors.torch
