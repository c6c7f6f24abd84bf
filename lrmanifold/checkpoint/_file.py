"""The two file formats, their version, and the checksums that name a damaged tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import write_atomically
from .._sealed import BLANK, SealError, check_seal, checksum, read_torch, set_seal, write_torch

FORMAT = "lrmanifold checkpoint"
VERSION = 3
_SUFFIX = ".safetensors"
_KEY = "lrmanifold"
_SEAL_KEY = "lrmanifold seal"
_SEALED_SINCE = 3


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


def write(path: Path, payload: Payload) -> None:
    """Write a payload, sealed, in the format that the name of the file asks for.

    Raises
    ------
    CheckpointError
        If safetensors has no such dtype.
    """
    if not is_safetensors(path):
        write_torch(path, payload)
        return
    packing = _safetensors()
    header = {k: v for k, v in payload.items() if k not in ("model", "optimizer", "extra")}
    metadata = {"format": "pt", _KEY: json.dumps(header), _SEAL_KEY: BLANK}
    try:
        data = packing.save(payload["model"], metadata=metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: safetensors cannot hold this model ({error})") from error
    write_atomically(path, set_seal(data))


def read(path: Path) -> Payload:
    """Read a payload of the present version; older ones are brought to it.

    Raises
    ------
    CheckpointError
        If there is no such file, it is damaged, or of a newer version.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    try:
        raw, sealed = _read(path)
    except SealError as error:
        raise CheckpointError(f"{path}: {error}{_damaged_tensor(path)}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a dict, got {type(raw).__name__}")
    if raw.get("format") != FORMAT:
        raw = _plain_state_dict(path, raw)
    return _verified(path, _migrated(path, raw, sealed))


def _read(path: Path, check: bool = True) -> tuple[Payload, bool]:
    return _read_safetensors(path, check) if is_safetensors(path) else read_torch(path, check)


def _damaged_tensor(path: Path) -> str:
    """In words, the first tensor that changed, as far as the file can still be read."""
    try:
        raw, _ = _read(path, check=False)
        changed = (k for k, known in raw["checksums"].items() if checksum(raw["model"][k]) != known)
        return f"; the values of {next(changed)!r} are not those that were saved"
    except Exception:  # the damage is elsewhere, or everywhere
        return ""


def _read_safetensors(path: Path, check: bool) -> tuple[Payload, bool]:
    packing = _safetensors()
    from safetensors import SafetensorError

    data = path.read_bytes()  # once: another writer may replace the file at any moment
    sealed = check and check_seal(data)
    try:
        tensors = dict(sorted(packing.load(data).items()))
        # its header is the JSON behind eight bytes with its length
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
        header = json.loads((metadata or {}).get(_KEY, "null"))
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise SealError(f"is damaged, or no safetensors file ({error})") from error
    if header is None:
        return tensors, sealed
    if not isinstance(header, dict):
        raise SealError(
            f"has metadata {_KEY!r} that must be a JSON object, got {type(header).__name__}"
        )
    return {**header, "model": tensors, "optimizer": None, "extra": None}, sealed


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
    known: Payload = {"aliases": {}, "geometry": {}, "checksums": {}}
    return {**empty, **known, **payload}


# What brings a payload of a version to the next one; files of version 1 are refused before.
MIGRATIONS: dict[int, Callable[[Payload], Payload]] = {0: _from_0, 1: dict, 2: dict}


def _migrated(path: Path, payload: Payload, sealed: bool) -> Payload:
    version = payload.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise CheckpointError(f"{path}: version must be an integer >= 0, got {version!r}")
    if version > VERSION:
        raise CheckpointError(
            f"{path}: has version {version}, this library reads up to {VERSION}: update it"
        )
    if version == 1:
        raise CheckpointError(
            f"{path}: has version 1, which no release wrote and whose convolutions had another "
            "order: densify the model with the code that wrote it, and save that"
        )
    if version >= _SEALED_SINCE and not sealed:
        raise CheckpointError(f"{path}: is damaged: its seal is missing")
    for old in range(version, VERSION):
        payload = {**MIGRATIONS[old](payload), "version": old + 1}
    return payload


def _verified(path: Path, payload: Payload) -> Payload:
    """Check the header and every checksum; put the aliases back."""
    for key in ("model", "aliases", "geometry", "checksums"):
        if not isinstance(payload.get(key), dict):
            raise CheckpointError(f"{path}: {key!r} must be a dict, got {payload.get(key)!r:.60}")
    for key, known in payload["geometry"].items():
        if not isinstance(known, dict):
            raise CheckpointError(f"{path}: the geometry of {key!r} must be a dict, got {known!r}")
    state = payload["model"]
    for key, known in payload["checksums"].items():
        if not isinstance(state.get(key), Tensor):
            raise CheckpointError(f"{path}: is damaged: the tensor {key!r} is missing")
        # a view of a few bytes could claim any size, and its checksum would need that memory
        if not state[key].is_contiguous() or checksum(state[key]) != known:
            raise CheckpointError(
                f"{path}: is damaged: the values of {key!r} are not those that were saved"
            )
    for key, source in payload["aliases"].items():
        if not isinstance(source, str) or source not in state:
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
