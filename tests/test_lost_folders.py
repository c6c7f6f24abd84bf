"""Nothing is lost to a folder that goes away, a full log, a reader that leaves, a layer of 0."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from command_line import STEPS, assert_refused, few_digits, invoke, names, read_only, train

from lrmanifold import _lock
from lrmanifold.cli import _certify, _commands, _train, main
from lrmanifold.experiments import demo as demos
from lrmanifold.experiments import runs

FILES = ["accuracy.png", "model.pt", "results.json", "spectra.png"]
DEMO = ("demo", "--epochs", 1, "--seeds", 1, "--rank", 8)
# they share the rescue; a demo takes three times as long
COMMANDS = ["train", pytest.param("demo", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where temporary folders are made; the images are few."""
    images, folder = few_digits(), tmp_path / "elsewhere"
    monkeypatch.setattr(_commands, "load", lambda name, root: images)
    monkeypatch.setattr(demos, "load", lambda name: images)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def after(monkeypatch, module, name: str, happens) -> None:
    """Let something happen when a function of the library has done its work."""
    real = getattr(module, name)

    def function(*args, **options):
        result = real(*args, **options)
        happens()
        return result

    monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize("save_every", [0, 100])
def test_the_folder_of_a_training_that_was_removed_is_made_again(tmp_path, monkeypatch, save_every):
    folder = tmp_path / "run"
    after(monkeypatch, _train, "train", lambda: shutil.rmtree(folder))
    result = train(folder, "--save-every", save_every)
    assert result.exit_code == 0, result.output
    assert f"warning: {folder} was removed in the meantime: it is made again" in result.stderr
    assert names(folder) == FILES
    assert runs.load_results(folder)["settings"]["rank"] == 5


@pytest.mark.slow
def test_the_folder_of_a_demo_that_was_removed_is_made_again(tmp_path, monkeypatch):
    folder = tmp_path / "demo"
    after(monkeypatch, demos, "run", lambda: shutil.rmtree(folder))
    result = invoke(*DEMO, "--out", folder)
    assert result.exit_code == 0, result.output
    assert "was removed in the meantime" in result.stderr
    assert names(folder) == FILES


@pytest.mark.parametrize("command", COMMANDS)
def test_results_go_elsewhere_when_a_file_is_in_the_place_of_the_folder(
    tmp_path, monkeypatch, command, elsewhere
):
    folder = tmp_path / "run"

    def replaced() -> None:
        shutil.rmtree(folder)
        folder.write_text("mine")

    after(monkeypatch, *((_train, "train") if command == "train" else (demos, "run")), replaced)
    result = train(folder) if command == "train" else invoke(*DEMO, "--out", folder)
    (rescued,) = elsewhere.iterdir()
    assert_refused(result, "Not a directory", f"the results are in {rescued} instead")
    assert names(rescued) == FILES
    assert folder.read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
def test_results_go_elsewhere_when_the_folder_has_become_read_only(
    tmp_path, monkeypatch, command, elsewhere
):
    folder = tmp_path / "run"
    where = (_train, "train") if command == "train" else (demos, "run")
    after(monkeypatch, *where, lambda: read_only(monkeypatch, folder))
    result = train(folder) if command == "train" else invoke(*DEMO, "--out", folder)
    (rescued,) = elsewhere.iterdir()
    assert_refused(result, "no permission to write", f"the results are in {rescued} instead")
    assert names(rescued) == FILES


def test_a_training_that_has_ended_is_not_lost_to_its_last_checkpoint(
    tmp_path, monkeypatch, elsewhere
):
    folder, real, made = tmp_path / "run", _train.progress_bar, []

    class Bar:
        """The folder becomes read-only in the last step but one."""

        def __init__(self, *args) -> None:
            self.bar = real(*args)

        def __enter__(self):
            say, advance = self.bar.__enter__()

            def counted() -> None:
                made.append(advance())
                if len(made) == STEPS - 1:
                    read_only(monkeypatch, folder)

            return say, counted

        def __exit__(self, *args):
            return self.bar.__exit__(*args)

    monkeypatch.setattr(_train, "progress_bar", Bar)
    result = train(folder)
    (rescued,) = elsewhere.iterdir()
    assert_refused(result, f"the results are in {rescued} instead")
    assert "warning: the last checkpoint could not be written: " in result.stderr
    assert len(runs.load_results(rescued)["history"]["loss"]) == 2


def test_divergence_in_a_read_only_folder_is_one_line(tmp_path, monkeypatch):
    def diverges(*_, checkpoint, **__):
        checkpoint.write_bytes(b"")
        read_only(monkeypatch, tmp_path / "run")
        raise FloatingPointError("lower lr")

    monkeypatch.setattr(_train, "train", diverges)
    assert_refused(train(tmp_path / "run"), "lower lr")


def test_files_of_others_stay_when_the_results_cannot_be_written(tmp_path, monkeypatch):
    """What came into the folder in the meantime is not taken for half of the results."""

    def full(path, **_):
        (tmp_path / "run" / "notes.txt").write_text("mine")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(runs, "save_model", full)
    result = train(tmp_path / "run", "--save-every", 0)
    assert_refused(result, "no space left")
    assert names(tmp_path / "run") == ["notes.txt"]


def test_a_lock_that_another_has_taken_in_a_new_folder_stays(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with _lock.locked(folder, "first"):
        shutil.rmtree(folder)
        folder.mkdir()
        second = _lock.locked(folder, "second")
        second.__enter__()
    assert names(folder) == [_lock.NAME]
    second.__exit__(None, None, None)
    assert not names(folder)


# -- the output


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file of Linux")
@pytest.mark.parametrize(("stream", "code"), [("stdout", 2), ("stderr", 0)])
def test_a_log_on_a_full_disk_costs_no_results(tmp_path, monkeypatch, capsys, stream, code):
    words = ("train", "--epochs", "1", "--rank", "5", "--save-every", "0", "--out")
    with contextlib.suppress(OSError), open("/dev/full", "w") as full, monkeypatch.context() as now:
        now.setattr(sys, stream, full)
        found = main([*words, str(tmp_path / "run")])
    assert found == code
    assert names(tmp_path / "run") == FILES
    said = capsys.readouterr()
    if stream == "stdout":
        assert said.err.splitlines()[-1] == "error: no space left for the output"
    else:
        assert "written: " in said.out


def test_a_certificate_is_not_lost_to_a_reader_that_leaves(tmp_path, monkeypatch):
    def leave(found):
        raise BrokenPipeError

    folder = tmp_path / "run"
    assert train(folder).exit_code == 0
    monkeypatch.setattr(_certify, "load", lambda name, root: few_digits())
    monkeypatch.setattr(_certify, "table", leave)
    assert isinstance(invoke("certify", folder, "--no-attack").exception, BrokenPipeError)
    assert names(folder) == sorted([*FILES, "certificate.json", "certificate.png"])


# -- what cannot be drawn


def test_factors_that_decay_to_zero_have_results(tmp_path):
    options = ("--method", "factors", "--weight-decay", 10, "--epochs", 12, "--batch-size", 16)
    folder = tmp_path / "run"
    result = train(folder, *options)
    assert result.exit_code == 0, result.output
    assert 0.0 in runs.load_results(folder)["history"]["spectra"]["network.fc1"][-1]
    assert "warning: no picture of fc1, fc2: singular values of 0, Inf or NaN" in result.stderr
    assert names(folder) == [name for name in FILES if name != "spectra.png"]
    assert train(folder, *options).output.startswith("finished already")
