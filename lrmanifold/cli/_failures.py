"""What goes wrong on the command line: one line with the cause and a way out, and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import typer

from .._lock import LockedError
from ..experiments.folder import State, claimed

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
OUT = "choose another folder by --out"


def explained(error: BaseException, elsewhere: str = "") -> str:
    """An error in one line, with a way out where the system's words have none.

    Parameters
    ----------
    error : exception
    elsewhere : str
        How to write to another place, if this was about writing.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return f"the device has too little memory ({text.split('.')[0]}): lower --batch-size"
    if not isinstance(error, OSError) or error.errno is None:
        return text
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _FULL:
        return f"no space left{where}: free some{f', or {elsewhere}' if elsewhere else ''}"
    if error.errno in _CLOSED and elsewhere:
        return f"no permission to write{where}: {elsewhere}"
    if error.errno in _CLOSED:
        return f"no permission{where}"
    return f"{error.strerror}{where}"


@contextlib.contextmanager
def one_line_errors(
    *kinds: type[Exception],
    way_out: Callable[[Exception], str] = lambda error: "",
    elsewhere: str = "",
) -> Iterator[None]:
    """What a user got wrong is one line and exit code 2; by default for the checks of arguments.

    Training runs outside, or inside for a named error only: a bug there must show its traceback.

    Parameters
    ----------
    *kinds : exception classes
    way_out : callable
        From the error to what ends the line.
    elsewhere : str
        As in :func:`explained`.
    """
    wrong = kinds or (ValueError, TypeError, OSError, ImportError, LockedError)
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads any more
    except wrong as error:
        fail(f"{explained(error, elsewhere)}{way_out(error)}")


def say(line: str, *, err: bool = False) -> None:
    """Print a line before there are results: none are lost to a log on a full disk."""
    try:
        typer.echo(line, err=err)
    except OSError as error:
        if error.errno not in _FULL:
            raise


def fail(line: str) -> None:
    """Print one line and leave with exit code 2."""
    typer.echo(f"error: {' '.join(line.split())}", err=True)
    raise typer.Exit(2) from None


@contextlib.contextmanager
def claim_folder(
    folder: Path, files: tuple[str, ...], expected: dict[str, Any], *, what: str, force: bool
) -> Iterator[State]:
    """:func:`~lrmanifold.experiments.folder.claimed`, with refusals in one line."""
    with contextlib.ExitStack() as stack:
        with one_line_errors(elsewhere=OUT):
            claim = claimed(folder, files, expected, what=what, force=force)
            state = stack.enter_context(claim)
        yield state


def write_somewhere(
    folder: Path, files: Mapping[str, Callable[[Path], object]], *, elsewhere: str = OUT
) -> None:
    """Write files to a folder; if that fails, to a new temporary one, and say so with exit code 2.

    What took hours to compute is not lost to a full disk or a folder that has gone.

    Parameters
    ----------
    folder : path
    files : dict
        By name, in the order of writing: what writes the file to a path, whole or not at all.
    elsewhere : str
        As in :func:`explained`.
    """
    if not os.path.lexists(folder):
        say(f"warning: {folder} was removed in the meantime: it is made again", err=True)
    try:
        _write_all(folder, files)
        return
    except OSError as error:
        cause = explained(error, elsewhere)
    try:
        other = Path(tempfile.mkdtemp(prefix="lrmanifold-"))
        _write_all(other, files)
    except OSError as error:
        fail(f"{cause}; nor could the results be written elsewhere: {explained(error)}")
    fail(f"{cause}; the results are in {other} instead: move them before it is emptied")


def _write_all(folder: Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    """All of them, or no new file: half of the results would look like a run."""
    new = []
    try:
        for name, write in files.items():
            replaced = os.path.lexists(folder / name)
            write(folder / name)
            new += [] if replaced else [folder / name]
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
