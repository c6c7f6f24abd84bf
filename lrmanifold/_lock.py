"""One process at a time in a folder, and the name of the one that is there."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ._files import is_at, lock

NAME = ".lrmanifold-lock"


class LockedError(RuntimeError):
    """Another process works in the folder."""


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Hold a folder, which must exist, while the block runs.

    The system frees the lock of a process that dies, so a killed run never blocks the next one. On
    file systems without locks the name in the lock file counts while its process runs.

    Parameters
    ----------
    folder : path
    what : str
        What the process does, for the message to others.

    Raises
    ------
    LockedError
        If another process or thread holds it; says which.
    OSError
        If the folder cannot be written.
    """
    path = Path(folder) / NAME
    descriptor = _taken(path)
    try:
        who = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "what": what,
        }
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(who).encode())
        yield
    finally:
        if os.name == "posix":  # while locked: afterwards it may be another's
            # by now the folder may be gone or read-only, or another's lock may have this name
            with contextlib.suppress(OSError):
                if is_at(descriptor, path):
                    path.unlink()
            os.close(descriptor)
        else:
            os.close(descriptor)  # Windows deletes no open file
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _taken(path: Path) -> int:
    """The lock file, open and ours."""
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            free, who = lock(descriptor), _read(descriptor)
            if free is None:
                free = not _is_running(who)
            if not free:
                raise LockedError(f"{path.parent} is in use by {_words(who)}")
            if is_at(descriptor, path):  # else its last holder has just removed it
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _read(descriptor: int) -> dict[str, object]:
    try:
        who = json.loads(os.pread(descriptor, 4096, 0) if hasattr(os, "pread") else b"")
    except (OSError, ValueError, RecursionError):
        return {}
    return who if isinstance(who, dict) else {}


def _words(who: dict[str, object]) -> str:
    if not {"process", "host", "since", "what"} <= who.keys():
        return "another process"
    since = f"since {who['since']}: {who['what']}"
    return f"process {who['process']} on {who['host']}, {since}"


def _is_running(who: dict[str, object]) -> bool:
    """Whether the process that wrote its name may still be there."""
    process = who.get("process")
    if not isinstance(process, int):
        return False
    if os.name != "posix" or who.get("host") != socket.gethostname():
        return True  # cannot be asked
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
