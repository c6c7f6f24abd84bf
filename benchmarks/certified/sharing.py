"""Several processes over one folder of results: who measures a run claims it by a file."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lrmanifold.experiments.replay import CaptureError

_EVERY = 0.5  # seconds between two looks at what another process measures
FAILED = "failed"


def claim(path: Path) -> bool:
    """Make the claim file; False where another process was first."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        file.write(f"{os.getpid()}\n")
    return True


def unclaim(folder: Path) -> int:
    """Remove all claims of a folder, of processes that ended before they were done."""
    paths = list(folder.glob("*.claim"))
    for path in paths:
        path.unlink()
    return len(paths)


def write_json(path: Path, result: dict[str, Any]) -> None:
    """In one piece: nobody reads half a file."""
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def shared(
    path: Path, measure: Callable[[], dict[str, Any]], *, wait: bool = True
) -> dict[str, Any] | None:
    """The result in `path`, measured now if nobody else does.

    What another process measures is waited for, or None without `wait`. A measurement that failed,
    here or there, is {}: its claim stays, so that it is not tried again before `unclaim`.
    """
    mark = path.with_suffix(".claim")
    while not path.is_file():
        if claim(mark):
            if path.is_file():  # written between the two looks
                mark.unlink()
                break
            try:
                result = measure()
            except Exception as error:
                traceback.print_exc()
                _check_device(mark)
                mark.write_text(FAILED)
                if isinstance(error, CaptureError):
                    sys.exit("a capture broke: nothing more is measured in this process")
                return {}
            except BaseException:
                mark.unlink(missing_ok=True)
                raise
            write_json(path, result)
            mark.unlink(missing_ok=True)
            return result
        if _failed(mark):
            return {}
        if not wait:
            return None
        time.sleep(_EVERY)
    return json.loads(path.read_text())


def _failed(mark: Path) -> bool:
    try:
        return mark.read_text() == FAILED
    except FileNotFoundError:
        return False


def _check_device(mark: Path) -> None:
    """A device that is lost ends the process: nothing more can be measured in it."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:
        mark.unlink(missing_ok=True)
        raise
