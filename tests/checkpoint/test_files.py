"""Files are written whole or not at all, sealed, and folders are held by one process at a time."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold import _files, _lock, _sealed, checkpoint
from lrmanifold._files import remove_leftovers, write_atomically
from lrmanifold._lock import LockedError, locked
from lrmanifold._sealed import SealError, check_seal, read_torch, set_seal, write_torch
from lrmanifold.checkpoint import CheckpointError
from lrmanifold.experiments import runs

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


# -- seals


def test_every_flipped_byte_of_a_sealed_file_is_found(tmp_path):
    write_torch(tmp_path / "a.pt", {"x": torch.arange(3)})
    runs.write_results(tmp_path / "results.json", {"format": runs.FORMAT, "a": 1.25})
    whole = (tmp_path / "a.pt").read_bytes()
    assert torch.equal(read_torch(tmp_path / "a.pt")[0]["x"], torch.arange(3))
    for i in (*range(0, len(whole) - 100, 3), *range(len(whole) - 100, len(whole))):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << (i % 8)
        (tmp_path / "b.pt").write_bytes(damaged)
        try:
            assert not read_torch(tmp_path / "b.pt")[1]  # its mark is damaged: known as unsealed
            assert i >= len(whole) - len(_sealed.BLANK)
        except SealError:
            pass
    whole = (tmp_path / "results.json").read_bytes()
    assert runs.load_results(tmp_path) == {"format": runs.FORMAT, "a": 1.25}
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << (i % 8)
        (tmp_path / "results.json").write_bytes(damaged)
        with pytest.raises(runs.RunError):
            runs.load_results(tmp_path)


def test_a_seal_is_the_digest_of_the_file_with_zeros_in_its_place():
    data = b"one " + _sealed.BLANK.encode() + b" two"
    sealed = bytes(set_seal(data))
    digits = sealed[20:84].decode()
    assert digits == _sealed.hashlib.sha256(data).hexdigest()
    assert check_seal(sealed)
    assert not check_seal(b"no seal")
    with pytest.raises(SealError, match="exactly one blank seal"):
        set_seal(b"none")


def test_other_programs_read_sealed_files_as_before(tmp_path):
    source = nn.Linear(3, 2)
    checkpoint.save(tmp_path / "a.pt", source)
    assert torch.equal(torch.load(tmp_path / "a.pt")["model"]["weight"], source.weight)
    mapped = torch.load(tmp_path / "a.pt", mmap=True)["model"]["weight"]
    assert torch.equal(mapped, source.weight)
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"lrmanifold-seal:")
    packing = pytest.importorskip("safetensors.torch")
    checkpoint.save(tmp_path / "a.safetensors", source)
    assert torch.equal(packing.load_file(tmp_path / "a.safetensors")["weight"], source.weight)


def test_files_without_a_seal_are_checked_by_the_sums_of_their_archive(tmp_path):
    source = nn.Linear(40, 30)
    torch.save(source.state_dict(), tmp_path / "theirs.pt")
    checkpoint.load(tmp_path / "theirs.pt", nn.Linear(40, 30))
    data = bytearray((tmp_path / "theirs.pt").read_bytes())
    data[data.find(source.weight.detach().numpy().tobytes()) + 9] ^= 1
    (tmp_path / "theirs.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: the bytes of .*data/0 are not those"):
        checkpoint.load(tmp_path / "theirs.pt", nn.Linear(40, 30))


# -- bombs


def test_compressed_archives_are_refused_before_they_unpack(tmp_path):
    torch.save({"x": torch.zeros(1_000_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in source.infolist():
            bomb.writestr(member.filename, source.read(member))
    assert (tmp_path / "bomb.pt").stat().st_size < 40_000
    with pytest.raises(CheckpointError, match="holds compressed data"):
        checkpoint.load(tmp_path / "bomb.pt", nn.Linear(1, 1))
    with pytest.raises(runs.RunError, match="holds compressed data"):
        runs.load_model(tmp_path / "bomb.pt")


def test_a_view_that_claims_a_huge_size_is_refused(tmp_path):
    checkpoint.save(tmp_path / "a.pt", nn.Linear(1, 1))
    raw = torch.load(tmp_path / "a.pt")
    raw["model"]["weight"] = torch.zeros(1).expand(2**30, 2**10)
    write_torch(tmp_path / "a.pt", raw)
    with pytest.raises(CheckpointError, match="'weight' are not those that were saved"):
        checkpoint.load(tmp_path / "a.pt", nn.Linear(1, 1))


def test_a_model_file_that_asks_for_a_huge_network_is_refused(tmp_path):
    size = {"name": "x", "image_shape": [3, 10**6, 10**4], "classes": 10}
    recipe = {"architecture": "mlp", "kind": "dense", "tau": None, "ranks": {}}
    data = {**size, "mean": [0.5], "std": [0.5]}
    saved = {"format": runs.FORMAT, "recipe": {**recipe, "data": data}}
    write_torch(tmp_path / "model.pt", {**saved, "state": {"w": torch.zeros(9)}})
    with pytest.raises(runs.RunError, match=r"does not fit together .9 stored numbers"):
        runs.load_model(tmp_path)


def test_json_that_is_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("[" * 100_000)
    with pytest.raises(runs.RunError, match="cannot be read"):
        runs.load_results(tmp_path)


# -- what cannot be written, what is of the wrong kind

HEADERS = {
    "a list": ([1], "must be a JSON object, got list"),
    "a number": (3, "must be a JSON object, got int"),
    "a word": ("x", "must be a JSON object, got str"),
    "no version": ({"format": "lrmanifold checkpoint"}, "version must be an integer"),
    "geometry": ({"geometry": {"weight": 3}}, "the geometry of 'weight' must be a dict, got 3"),
    "aliases": ({"aliases": {"b": ["weight"]}}, r"\['weight'\], shared by 'b', is missing"),
    "checksums": ({"checksums": 5}, "'checksums' must be a dict, got 5"),
    "a checksum": ({"checksums": {"weight": "x"}}, "the values of 'weight' are not those"),
    "a tensor that is not there": ({"checksums": {"v": 1}}, "the tensor 'v' is missing"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_metadata_of_the_wrong_kind_is_a_named_error(tmp_path, case):
    packing = pytest.importorskip("safetensors.torch")
    header, words = HEADERS[case]
    if isinstance(header, dict) and "format" not in header:
        parts = {"aliases": {}, "geometry": {}, "checksums": {}}
        header = {"format": "lrmanifold checkpoint", "version": 2, **parts, **header}
    for text in (json.dumps(header), "not json", "[" * 100_000):
        path, metadata = tmp_path / "a.safetensors", {"lrmanifold": text}
        packing.save_file({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, path, metadata)
        expected = words if text == json.dumps(header) else "is damaged, or no safetensors file"
        with pytest.raises(CheckpointError, match=expected):
            checkpoint.load(path, nn.Linear(1, 1))


def odd_models() -> dict[str, tuple[nn.Module, str]]:
    def holding(value, persistent=True):
        module = nn.Linear(2, 2)
        module.register_buffer("odd", value, persistent=persistent)
        return module

    off = lrm.nn.LowRankLinear(6, 5, 2)
    with torch.no_grad():
        off.weight.data[0] += 1
    nan_bias, inf_bias, nan_buffer = nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)
    with torch.no_grad():
        nan_bias.bias[0] = torch.nan
        inf_bias.bias[0] = torch.inf
        nan_buffer.running_var[1] = torch.nan
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    eye = torch.eye(3)
    return {
        "sparse": (holding(eye.to_sparse()), "'odd' must be a dense tensor, got layout torch.spa"),
        "csr": (holding(eye.to_sparse_csr()), "'odd' must be a dense tensor, got layout torch.sp"),
        "quantized": (holding(quantized), "'odd' must be a dense tensor, got the quantized type"),
        "meta": (holding(torch.ones(2, device="meta")), "'odd' has no values: it is on the meta"),
        "lazy": (nn.LazyLinear(3), "'weight' has no values yet: run the model once"),
        "off": (off, "'weight' is not a point of"),
        "NaN bias": (nan_bias, "'bias' holds NaN"),
        "Inf bias": (inf_bias, "'bias' holds Inf"),
        "NaN buffer": (nan_buffer, "'running_var' holds NaN"),
    }


@pytest.mark.parametrize("case", odd_models())
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_what_could_not_be_loaded_again_is_refused_by_name(tmp_path, case, name):
    pytest.importorskip("safetensors")
    model, words = odd_models()[case]
    write_atomically(tmp_path / name, b"the good file of before")
    with pytest.raises(CheckpointError, match=words):
        checkpoint.save(tmp_path / name, model)
    assert (tmp_path / name).read_bytes() == b"the good file of before"
    if case in ("NaN bias", "Inf bias", "NaN buffer"):
        torch.save(model.state_dict(), tmp_path / "theirs.pt")
        other = type(model)(*(2,) * (2 - isinstance(model, nn.BatchNorm1d)))
        before = {k: v.clone() for k, v in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load(tmp_path / "theirs.pt", other)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_odd_tensors_that_have_values_are_kept(tmp_path):
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    module.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
    module.register_buffer("view", torch.arange(12.0).reshape(3, 4).T)
    module.register_buffer("empty", torch.zeros(0, 3))
    module.register_buffer("small", torch.ones(3).to(torch.float8_e4m3fn))
    module.register_buffer("sparse", torch.eye(2).to_sparse(), persistent=False)
    checkpoint.save(tmp_path / "a.pt", module)
    other = nn.Linear(2, 2)
    for name, value in module.named_buffers():
        other.register_buffer(name, torch.zeros_like(value), persistent=name != "sparse")
    checkpoint.load(tmp_path / "a.pt", other)
    for key, value in module.state_dict().items():
        found = other.state_dict()[key]
        assert found.dtype == value.dtype
        wide = torch.complex64 if value.is_complex() else torch.float32
        assert torch.equal(found.to(wide), value.resolve_conj().to(wide)), key


def test_extra_must_be_readable_without_code_in_keys_and_values(tmp_path):
    import enum
    from collections import namedtuple

    class Key(enum.Enum):
        A = 1

    pair = namedtuple("Pair", "a b")
    for extra, words in (
        ({Key.A: 1}, r"the key <Key\.A: 1> of extra must be"),
        ({"p": pair(1, 2)}, r"extra\['p'\] must be a tensor.*got Pair"),
        ([torch.eye(2).to_sparse()], r"extra\[0\] must be a dense tensor"),
    ):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.save(tmp_path / "a.pt", nn.Linear(1, 1), extra=extra)
    extra = {"size": torch.Size([2]), 3: (1, [2.0, None]), (1, "a"): b"x"}
    checkpoint.save(tmp_path / "a.pt", nn.Linear(1, 1), extra=extra)
    assert checkpoint.load(tmp_path / "a.pt", nn.Linear(1, 1)).extra == extra
    assert checkpoint.peek(tmp_path / "a.pt") == extra


def test_an_optimizer_that_refuses_its_state_leaves_the_model_as_it_was(tmp_path):
    source, other = lrm.nn.LowRankLinear(6, 5, 3), lrm.nn.LowRankLinear(6, 5, 2)
    optimizer = lrm.optim.CondLR(source.parameters(), lr=0.1)
    checkpoint.save(tmp_path / "a.pt", source, optimizer)

    class Refusing(lrm.optim.CondLR):
        def load_state_dict(self, state):
            raise ValueError("not mine")

    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match="not mine"):
        checkpoint.load(tmp_path / "a.pt", other, Refusing(other.parameters(), lr=0.1))
    assert other.rank == 2
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
