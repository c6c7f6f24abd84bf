"""Files are written whole or not at all, sealed, and folders are held by one process at a time."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold import _files, _lock, checkpoint
from lrmanifold._files import remove_leftovers, write_atomically
from lrmanifold._lock import LockedError, locked
from lrmanifold.checkpoint import CheckpointError

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX file systems")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -- whole or not at all


def test_three_threads_save_one_path_and_a_reader_sees_whole_files_only(tmp_path):
    path, wrong, read, done = tmp_path / "a.pt", [], 0, threading.Event()
    models = [lrm.nn.LowRankLinear(9, 8, 2) for _ in range(3)]
    states = [m.weight.detach().clone() for m in models]
    checkpoint.save(path, models[0])

    def save(model):
        for _ in range(25):
            try:
                checkpoint.save(path, model)
            except Exception as error:
                wrong.append(error)

    def load():
        nonlocal read
        model = lrm.nn.LowRankLinear(9, 8, 2)
        while not done.is_set():
            try:
                checkpoint.load(path, model)
                read += 1
                assert any(torch.equal(model.weight, state) for state in states)
            except Exception as error:
                wrong.append(error)

    writers = [threading.Thread(target=save, args=(m,)) for m in models]
    reader = threading.Thread(target=load)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not wrong
    assert read > 5
    assert names(tmp_path) == ["a.pt"]


@posix
def test_a_link_under_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    guessed = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(_files.secrets, "token_hex", lambda _: next(guessed))
    os.symlink(victim, tmp_path / f".a.pt.{'0' * 16}.tmp")
    write_atomically(tmp_path / "a.pt", b"new")
    assert victim.read_bytes() == b"mine"
    assert (tmp_path / "a.pt").read_bytes() == b"new"


def test_temporary_names_cannot_be_guessed(tmp_path, monkeypatch):
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(a).name), replace(a, b)))
    for _ in range(20):
        write_atomically(tmp_path / "a", b"x")
    assert len(set(seen)) == 20
    assert all(str(os.getpid()) != name.split(".")[2] for name in seen)


@posix
def test_a_link_in_the_place_of_the_file_is_replaced_and_its_target_left(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "a.pt"
    victim.write_bytes(b"mine")
    os.symlink(victim, path)
    write_atomically(path, b"new")
    assert victim.read_bytes() == b"mine"
    assert path.read_bytes() == b"new"
    assert not path.is_symlink()


@pytest.mark.parametrize("where", ["fsync", "replace", "open"])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch, where):
    path = tmp_path / "a.pt"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.pt"]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "a.pt").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.pt"):
        write_atomically(tmp_path / "a.pt", b"new")
    assert names(tmp_path) == ["a.pt"]
    with pytest.raises(CheckpointError, match="is a folder"):
        checkpoint.load(tmp_path / "a.pt", nn.Linear(1, 1))


@posix
def test_a_file_keeps_its_permissions_and_one_that_is_read_only_is_not_replaced(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o444)
    with pytest.raises(PermissionError, match=r"Read-only file: .*a\.pt"):
        write_atomically(path, b"newer")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.pt"]


@posix
def test_a_device_or_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"not a file: .*pipe"):
        write_atomically(tmp_path / "pipe", b"new")
    assert (tmp_path / "pipe").is_fifo()


def stuck_writer(path, begun):
    os.fsync = lambda _: (begun.set(), time.sleep(60))  # type: ignore[assignment]
    write_atomically(path, b"half")


@posix
def test_leftovers_of_killed_writers_are_removed_and_files_of_living_ones_kept(tmp_path):
    path, context = tmp_path / "a.pt", multiprocessing.get_context("fork")
    begun = context.Event()
    writer = context.Process(target=stuck_writer, args=(path, begun))
    writer.start()
    assert begun.wait(30)
    for other in (".a.pt.notes", ".b.pt.0123456789abcdef.tmp", ".a.pt.123.tmp"):
        (tmp_path / other).touch()
    remove_leftovers(path)
    assert len(names(tmp_path)) == 4  # the writer is alive
    writer.kill()
    writer.join()
    remove_leftovers(path)
    assert names(tmp_path) == [".a.pt.123.tmp", ".a.pt.notes", ".b.pt.0123456789abcdef.tmp"]


@posix
def test_a_writer_whose_file_was_taken_for_a_leftover_makes_another(tmp_path, monkeypatch):
    taken = []
    real = _files.lock

    def late(descriptor):
        if not taken:  # someone else was here between open and lock
            taken.extend(tmp_path.iterdir())
            taken[0].unlink()
        return real(descriptor)

    monkeypatch.setattr(_files, "lock", late)
    write_atomically(tmp_path / "a", b"x")
    assert taken
    assert names(tmp_path) == ["a"]


# -- locks


@posix
def test_a_folder_is_held_by_one_and_says_by_whom(tmp_path):
    with locked(tmp_path, "first run"):
        words = rf"is in use by process {os.getpid()} on .*, since 20.*: first run"
        with pytest.raises(LockedError, match=words), locked(tmp_path, "second"):
            pass
        found = []
        thread = threading.Thread(target=lambda: found.append(try_to_lock(tmp_path)))
        thread.start()
        thread.join()
        assert "first run" in found[0]
    assert not names(tmp_path)
    with locked(tmp_path, "third"):
        pass


def try_to_lock(folder) -> str:
    try:
        with locked(folder, "other"):
            return ""
    except LockedError as error:
        return str(error)


def holder(folder, begun):
    with locked(folder, "a run that gets killed"):
        begun.set()
        time.sleep(60)


@posix
def test_a_killed_holder_blocks_nobody(tmp_path):
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=holder, args=(tmp_path, begun))
    process.start()
    assert begun.wait(30)
    assert f"process {process.pid}" in try_to_lock(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert names(tmp_path) == [_lock.NAME]
    assert try_to_lock(tmp_path) == ""
    assert not names(tmp_path)


@posix
def test_many_take_turns_and_never_two_at_once(tmp_path):
    inside, most, entered = 0, 0, 0
    guard = threading.Lock()

    def work():
        nonlocal inside, most, entered
        while True:
            try:
                with locked(tmp_path, "turn"):
                    with guard:
                        inside, entered = inside + 1, entered + 1
                        most = max(most, inside)
                    time.sleep(0.001)
                    with guard:
                        inside -= 1
                return
            except LockedError:
                time.sleep(0.0005)

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered) == (1, 12)
    assert not names(tmp_path)


@posix
def test_without_locks_of_the_system_the_name_in_the_file_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "fcntl", None)
    with locked(tmp_path, "first run"):
        assert "first run" in try_to_lock(tmp_path)
    host = _lock.socket.gethostname()
    for who, free in (
        ({"process": 2**22 + 1, "host": host}, True),
        ({"process": os.getppid(), "host": host}, False),
        ({"process": 1, "host": "elsewhere"}, False),
        ({"process": "x"}, True),
        ([], True),
    ):
        (tmp_path / _lock.NAME).write_text(json.dumps(who))
        assert (try_to_lock(tmp_path) == "") == free, who
        (tmp_path / _lock.NAME).unlink(missing_ok=True)
