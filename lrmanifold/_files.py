"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

Bytes = bytes | bytearray | memoryview

# The system's words for "this file system has no such locks".
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


def write_atomically(path: str | os.PathLike[str], data: Bytes) -> None:
    """Write a file whole or not at all; the folder is made if there is none.

    The bytes go to a temporary file beside it, which then replaces it in one step. A reader, or
    whoever comes after a crash, finds the old file or the new one; of several writers the last one
    wins. A symbolic link at `path` is replaced, not followed; the permissions of a file stay.

    Raises
    ------
    OSError
        Names `path`: also if it is a device or a pipe, or a file that nobody may write. Nothing is
        left of the temporary file.
    """
    path = Path(path)
    try:
        _write(path, data)
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        # A full disk names no file, and the temporary name helps nobody.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write(path: Path, data: Bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # which would be said of the file that is not there
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    mode = _mode(path)
    temporary, descriptor = _new_file(path)
    try:
        with open(descriptor, "wb") as file:
            # asked only for another one: some file systems have no permissions to change
            if mode not in (None, stat.S_IMODE(os.fstat(file.fileno()).st_mode)):
                os.chmod(temporary, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a crash may leave a renamed, empty file
            if fcntl is not None:
                os.replace(temporary, path)  # while locked, or it could be taken for a leftover
        if fcntl is None:
            os.replace(temporary, path)  # Windows renames no open file
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _mode(path: Path) -> int | None:
    """The permissions of the file that is replaced; None if there is none, or a link."""
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(mode):
        return None
    if not stat.S_ISREG(mode):  # replaced, it would be gone: /dev/null for one
        raise OSError(errno.EINVAL, "A device or pipe, not a file")
    if not mode & 0o222:  # a rename would not ask
        raise PermissionError(errno.EACCES, "Read-only file")
    return stat.S_IMODE(mode)


def _new_file(path: Path) -> tuple[Path, int]:
    """A new empty file beside `path`, locked while its writer lives."""
    # O_EXCL refuses a name that exists, a link included; the random name cannot be guessed.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            descriptor = os.open(temporary, flags, 0o666)
        except FileExistsError:
            continue
        # Someone may have taken it for a leftover before it was locked.
        if lock(descriptor) is not False and is_at(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete what killed writers of `path` left: temporary files that nobody holds."""
    path = Path(path)
    if not path.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.tmp")
    for other in path.parent.iterdir():
        if ours.fullmatch(other.name):
            with contextlib.suppress(OSError), _opened(other) as descriptor:
                if lock(descriptor):
                    other.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> bool | None:
    """Try to lock an open file until it is closed: whether that worked; None without such locks.

    The system frees the lock of a process that dies.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself survive a loss of power, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
