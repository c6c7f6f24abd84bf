"""What a run prints and stores; without torch, so that `--list` is quick."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .stating import words


def say(text: str) -> None:
    """Print at once; a reader that has left (``| head``) ends no run, its files are still due."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # nothing more may be flushed to it at the end, either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_places(files: Mapping[str, Path | None], folders: Mapping[str, Path | None]) -> None:
    """Raise now for what could not be written at the end of a long run.

    Parameters
    ----------
    files, folders : mapping
        From the name of an option to its path, or None.

    Raises
    ------
    ValueError
        Names the option, its path and what is wrong with it.
    """
    seen: dict[Path, str] = {}
    for name, path in files.items():
        if path is None:
            continue
        with _refused(name, path):
            _no_folder(name, path)
            if path.exists() and not path.is_file():  # it would be replaced, /dev/null for one
                raise ValueError(f"{name} must be an ordinary file, got the device or pipe {path}")
            other = seen.setdefault(path.resolve(), name)
            if other != name:
                raise ValueError(f"{name} must be another file than {other}, got {path} for both")
            _probe(path.parent, path.name)
    for name, folder in folders.items():
        if folder is not None:
            with _refused(name, folder):
                _probe(folder, "picture.png")
    for name, path in files.items():
        if path is not None:  # again: another option may have made it a folder
            _no_folder(name, path)


def _no_folder(name: str, path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {path}")


@contextlib.contextmanager
def _refused(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{name} {path} cannot be written: {error.strerror or error}") from error


def _probe(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}.", suffix=".tmp"):
        pass


def write(path: Path, content: bytes) -> None:
    """To a temporary file, moved into place: no reader finds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def store(path: Path, content: bytes) -> str:
    """Write a file; if that fails, to a new temporary folder: what was computed is not lost.

    Returns
    -------
    str
        What went wrong and where the file is instead, in one line; empty if nothing did.
    """
    try:
        write(path, content)
        return ""
    except OSError as error:
        cause = f"{path} cannot be written: {error.strerror or error}"
    try:
        other = Path(tempfile.mkdtemp(prefix="theory-")) / path.name
        write(other, content)
    except OSError as error:
        return f"{cause}; nor can a temporary folder: {error.strerror or error}"
    return f"{cause}; it is in {other} instead"


def to_json(content: Any) -> str:
    """Strict JSON, with a newline at the end."""
    return json.dumps(_plain(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def list_json(claims: Sequence[Any]) -> str:
    """What claims, or their catalogue entries, say."""
    return to_json({"claims": [words(claim) for claim in claims]})


def _plain(x: Any) -> Any:
    """JSON has neither NaN nor infinity, nor tensors."""
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else str(x)
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if hasattr(x, "tolist"):
        return _plain(x.tolist())
    return x if x is None or isinstance(x, (str, int, float, bool)) else str(x)
