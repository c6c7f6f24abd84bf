"""The folder of a run: what is in it, whose it is, and one run at a time."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from .._files import remove_leftovers
from .._lock import locked
from .data import NAMES
from .resume import difference
from .runs import RunError, load_model, load_results
from .training import Settings

State = Literal["new", "unfinished", "finished"]

RUN_FILES = (
    "results.json",
    "model.pt",
    "accuracy.png",
    "spectra.png",
    "certificate.png",
    "checkpoint.pt",
)
DEMO_FILES = RUN_FILES[:4]


def certificate_files(data: str | None = None) -> tuple[str, str]:
    """The names that ``lrmanifold certify`` writes, for a run's own data or for others."""
    stem = "certificate" if data is None else f"certificate-{data}"
    return f"{stem}.json", f"{stem}.png"


# They say something of one network, and go with it.
CERTIFICATES = tuple(name for data in (None, *NAMES) for name in certificate_files(data))


class FolderError(ValueError):
    """A folder holds what a run must not overwrite."""


@contextlib.contextmanager
def claimed(
    folder: Path,
    files: tuple[str, ...],
    expected: dict[str, Any],
    *,
    what: str,
    force: bool = False,
) -> Iterator[State]:
    """Hold a folder for a run, and tell what is there of it.

    Yields "finished" if ``results.json`` has the same settings, "unfinished" if there is a
    checkpoint of a run (its owner is checked when it is read), else "new".

    Parameters
    ----------
    folder : path
        Made if there is none; one that was made and stays empty is removed at the end.
    files : tuple of str
        The names that the run writes.
    expected : dict of dicts
        The parts of ``results.json`` that two runs must share to be the same.
    what : str
        For the message to other processes.
    force : bool
        Overwrite: files of these names are removed, and certificates; all others stay.

    Raises
    ------
    FolderError
        If the folder holds another run, or files of others without a run, and not `force`; if there
        is a folder in the place of a file.
    LockedError
        If another process uses it.
    OSError
        If it cannot be made or written.
    """
    made = _make(folder)
    try:
        with locked(folder, what):
            replaced = (*files, *CERTIFICATES) if force else files
            refuse_folders(folder, replaced, "remove it, or choose another folder by --out")
            for name in replaced:
                remove_leftovers(folder / name)
                if force:
                    (folder / name).unlink(missing_ok=True)
            yield "new" if force else _state(folder, files, expected)
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if it is empty


def _make(folder: Path) -> list[Path]:
    """Make a folder; those that were not there, the innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise FolderError(f"out must be a folder, got the file {folder}") from None
    return missing


def refuse_folders(folder: Path, files: tuple[str, ...], way_out: str = "remove it") -> None:
    """Refuse folders in the place of files that are to be written."""
    for name in files:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise FolderError(f"{folder / name} is a folder, in the place of a file: {way_out}")


def _state(folder: Path, files: tuple[str, ...], expected: dict[str, Any]) -> State:
    there = {name for name in os.listdir(folder) if not name.startswith(".")}
    if "results.json" in there:
        _check_results(folder, expected)
        return "finished"
    if "checkpoint.pt" in there & set(files):
        return "unfinished"
    if there:
        named = ", ".join(sorted(there)[:5]) + (", ..." if len(there) > 5 else "")
        raise FolderError(
            f"{folder} holds files of no known run ({named}): choose another folder by --out; with "
            f"--force the run writes {', '.join(files)} there, removes certificates, and leaves "
            "others"
        )
    return "new"


def _check_results(folder: Path, expected: dict[str, Any]) -> None:
    ways = "choose another folder by --out, or replace the run by --force"
    try:
        found = load_results(folder)
    except RunError as error:
        raise FolderError(f"{error}: {ways}") from error
    for part, known in json.loads(json.dumps(expected)).items():
        other = found.get(part)
        other = other if isinstance(other, dict) else {}
        # older results have no checksums
        sums = {key: value for key, value in known.items() if "CRC-32" in key}
        words = difference(known, other, _defaults(other) if part == "settings" else sums)
        if words is not None:
            raise FolderError(f"{folder} holds the results of another run, with {words}: {ways}")
    # a demo whose networks diverged has none to write
    if "model.pt" not in found.get("files", ("model.pt",)):
        return
    if not (folder / "model.pt").is_file():
        raise FolderError(f"{folder} holds results.json, but no model.pt: {ways}")
    try:
        load_model(folder)
    except RunError as error:
        raise FolderError(f"{error}: {ways}") from error


def _defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """What stands for settings that a run leaves out."""
    # certified runs did not name it at first
    optimizer = "adam" if settings.get("certified") else Settings.optimizer
    return {**vars(Settings()), "optimizer": optimizer, "keep_larger": False}
