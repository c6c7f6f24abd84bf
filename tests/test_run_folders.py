"""The command line overwrites no run and no foreign files, and loses no finished training."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")

from command_line import (
    FILES,
    OPTIONS,
    STEPS,
    assert_refused,
    few_digits,
    invoke,
    names,
    train,
    use_few_digits,
)

from lrmanifold import _lock, checkpoint
from lrmanifold.cli import _train
from lrmanifold.cli._failures import explained
from lrmanifold.experiments import runs


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    use_few_digits(monkeypatch)


def train_dense(folder: Path, *args: object):
    return invoke("train", *OPTIONS[:-2], "--method", "dense", *args, "--out", folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        images = few_digits()
        patch.setattr("lrmanifold.cli._commands.load", lambda name, root: images)
        result = train(folder)
    assert result.exit_code == 0, result.output
    assert names(folder) == FILES
    return folder


# -- whose folder it is


def test_the_same_finished_command_says_so_and_does_not_train(finished):
    before = contents(finished)
    result = train(finished)
    assert result.exit_code == 0
    assert result.output.startswith("finished already: ")
    assert "--force" in result.output
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lr", 0.05), "with lr 0.1 instead of 0.05"),
        (("--seed", 1), "with seed 0 instead of 1"),
        (("--eps", "0.3"), "with eps [0.05, 0.1, 0.15] instead of [0.3]"),
        (("--tau", 0.2), "with method "),
        (("--method", "svd"), "with method "),
        (("--weight-decay", 0.01), "with weight_decay 0.0 instead of 0.01"),
        (("--label-smoothing", 0.1), "with label_smoothing 0.0 instead of 0.1"),
        (("--optimizer", "adam", "--lr", 0.1), "with optimizer sgd instead of adam"),
        (("--keep-larger",), "with keep_larger False instead of True"),
    ],
)
def test_results_of_other_settings_are_left_alone(finished, options, words):
    before = contents(finished)
    assert_refused(train(finished, *options), words, "--out", "--force")
    assert contents(finished) == before


def test_force_replaces_them_and_leaves_foreign_files(finished, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, content in contents(finished).items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("mine")
    result = train(folder, "--lr", 0.05, "--force")
    assert result.exit_code == 0, result.output
    assert "written: accuracy.png, model.pt, results.json, spectra.png in" in result.output
    assert runs.load_results(folder)["settings"]["lr"] == 0.05
    assert (folder / "notes.txt").read_text() == "mine"
    assert names(folder) == sorted([*FILES, "notes.txt"])


@pytest.mark.parametrize("name", ["notes.txt", "model.pt", "results.json", "accuracy.png"])
def test_foreign_files_are_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for result in (train(tmp_path), invoke("demo", "--epochs", 1, "--out", tmp_path)):
        assert_refused(result, name, "--out", "--force")
        assert contents(tmp_path) == {name: b"mine"}


def test_hidden_files_of_the_system_are_no_reason_to_refuse(tmp_path):
    (tmp_path / ".DS_Store").touch()
    assert train(tmp_path).exit_code == 0


@pytest.mark.parametrize("name", [*FILES, "checkpoint.pt"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_the_training(tmp_path, name):
    (tmp_path / name).mkdir()
    for force in ((), ("--force",)):
        assert_refused(train(tmp_path, *force), f"{name} is a folder", "remove it", "--out")
    assert names(tmp_path) == [name]


def test_a_damaged_result_is_refused(finished, tmp_path):
    text = (finished / "results.json").read_bytes()
    (tmp_path / "results.json").write_bytes(text.replace(b'"lr": 0.1', b'"lr": 0.2'))
    assert_refused(train(tmp_path, "--lr", 0.2), "is damaged", "--force")
    (tmp_path / "results.json").write_bytes(text)
    assert_refused(train(tmp_path), "no model.pt", "--force")


def test_two_runs_never_share_a_folder(tmp_path):
    with _lock.locked(tmp_path, "lrmanifold train, CondLR tau=0.5 on digits"):
        for result in (train(tmp_path, "--force"), invoke("demo", "--out", tmp_path)):
            words = f"is in use by process {os.getpid()} on ", "CondLR tau=0.5 on digits"
            assert_refused(result, *words)
    assert not names(tmp_path)


def test_the_demo_is_not_repeated_without_force(tmp_path):
    options = ("demo", "--epochs", 1, "--seeds", 1, "--rank", 8, "--out", tmp_path)
    assert invoke(*options).exit_code == 0
    before = contents(tmp_path)
    assert sorted(before) == FILES
    again = invoke(*options)
    assert again.exit_code == 0
    assert again.output.startswith("finished already: ")
    assert_refused(invoke(*options, "--lr", 0.2), "with lr None instead of 0.2")
    assert_refused(train(tmp_path), "holds the results of another run")
    assert contents(tmp_path) == before
    assert runs.load_results(tmp_path)["settings"]["rank"] == 8


# -- going on


def test_ctrl_c_says_where_it_stopped_and_the_next_run_that_it_resumes(finished, tmp_path):
    def stopped(step: int, *options):
        script = (
            "import sys, os, signal, dataclasses\n"
            # a job in the background of a shell inherits that Ctrl-C is ignored
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "sys.path.insert(0, os.environ['TESTS'])\n"
            "import test_run_folders as t\n"
            "from lrmanifold import cli\n"
            "from lrmanifold.cli import _commands as c, _train as tr\n"
            "images = t.few_digits(); c.load = lambda name, root: images\n"
            "real, count = tr.train, 0\n"
            "def train(*args, on_step, **options):\n"
            "    def counted():\n"
            "        global count; count += 1; on_step()\n"
            f"        if count == {step}: os.kill(os.getpid(), signal.SIGINT)\n"
            "    return real(*args, on_step=counted, **options)\n"
            "tr.train = train\n"
            "sys.exit(cli.main(sys.argv[1:]))\n"
        )
        command = [sys.executable, "-c", script, "train", *map(str, (*OPTIONS, *options))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TESTS": str(Path(__file__).parent)}
        return subprocess.run(
            [*command, "--out", str(tmp_path / "run")], env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    cut = stopped(13, "--save-every", 5)
    assert cut.returncode == 130, cut.stderr
    assert cut.stderr.splitlines()[-1] == (
        f"stopped at step 13 of {STEPS}; the same command goes on after step 10"
    )
    assert "Traceback" not in cut.stderr
    assert names(tmp_path / "run") == ["checkpoint.pt"]
    again = train(tmp_path / "run", "--save-every", 5)
    assert again.exit_code == 0, again.output
    assert f"resumes after step 10 of {STEPS}, from " in again.stderr
    assert names(tmp_path / "run") == FILES
    one, other = (torch.load(x / "model.pt")["state"] for x in (finished, tmp_path / "run"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_ctrl_c_before_the_first_checkpoint_says_that_nothing_was_saved(tmp_path, monkeypatch):
    def interrupted(*_, on_step, **__):
        on_step()
        raise KeyboardInterrupt

    monkeypatch.setattr("lrmanifold.cli._train.train", interrupted)
    for every, words in ((5, " yet"), (0, ", as --save-every is 0")):
        result = train(tmp_path / "run", "--save-every", every)
        assert result.exit_code == 130
        assert result.stderr.splitlines()[-1] == (
            f"stopped at step 1 of {STEPS}; nothing was saved{words}: the same command starts anew"
        )
        assert not names(tmp_path)


def cut_off(folder: Path, monkeypatch, *options) -> None:
    """Leaves the checkpoint of a training that has ended."""

    def fail(*_, **__):
        raise RuntimeError("cut off")

    monkeypatch.setattr("lrmanifold.cli._train._finish", fail)
    result = train(folder, "--save-every", 5, *options)
    monkeypatch.undo()
    assert isinstance(result.exception, RuntimeError)
    assert names(folder) == ["checkpoint.pt"]


def test_a_checkpoint_of_other_settings_is_named_with_what_differs(tmp_path, monkeypatch):
    cut_off(tmp_path, monkeypatch)
    monkeypatch.setattr("lrmanifold.cli._commands.load", lambda name, root: few_digits())
    before = contents(tmp_path)
    for options, found, wanted in (
        (("--lr", 0.05), "lr 0.1", "0.05"),
        (("--rank", 6), "rank=5", "rank=6"),
        (("--tau", 0.25), "tau=0.1", "tau=0.25"),
        (("--weight-decay", 0.01), "with weight_decay 0.0", "0.01"),
        (("--label-smoothing", 0.1), "with label_smoothing 0.0", "0.1"),
        (("--momentum", 0.5), "with momentum 0.3", "0.5"),
        (("--optimizer", "adam", "--lr", 0.1), "with optimizer CondLR", "CondLRAdam"),
    ):
        result = train(tmp_path, *options)
        assert_refused(result, "belongs to another run", "--force")
        line = result.stderr.splitlines()[-1]
        instead = re.search(r"with (.*) instead of (.*): delete it", line)
        assert instead is not None
        assert instead[1] != f"{found.split()[0]} {instead[2]}"
        assert found in line
        assert wanted in instead[2]
    assert contents(tmp_path) == before
    assert train(tmp_path, "--lr", 0.05, "--force").exit_code == 0


def test_without_checkpoints_that_of_a_run_that_was_cut_off_is_not_lost(tmp_path, monkeypatch):
    cut_off(tmp_path, monkeypatch)
    monkeypatch.setattr("lrmanifold.cli._commands.load", lambda name, root: few_digits())
    before = contents(tmp_path)
    for options in ((), ("--lr", 0.05)):
        result = train(tmp_path, "--save-every", 0, *options)
        assert_refused(result, "checkpoint.pt", "--save-every 0", "--out", "--force")
    assert contents(tmp_path) == before
    assert train(tmp_path, "--save-every", 0, "--force").exit_code == 0
    assert "checkpoint.pt" not in names(tmp_path)


def test_other_images_of_the_same_number_are_another_run(tmp_path, monkeypatch):
    cut_off(tmp_path, monkeypatch)
    images = few_digits()
    other = dataclasses.replace(images, train_x=images.train_x.flip(-1))
    monkeypatch.setattr("lrmanifold.cli._commands.load", lambda name, root: other)
    assert_refused(train(tmp_path), "with images (CRC-32) ")


def test_a_damaged_checkpoint_is_refused_with_a_way_out(tmp_path, monkeypatch):
    cut_off(tmp_path, monkeypatch)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-7])
    assert_refused(train(tmp_path), "is damaged", "--force")


def test_low_rank_steps_that_are_left_out_are_no_second_message_beside_an_error(tmp_path):
    result = train(tmp_path, "--lr", 1e8)
    assert_refused(result, "lower lr")
    assert "left out" not in result.stderr


def test_warnings_of_a_training_are_lines_after_the_bar(tmp_path, monkeypatch):
    real = _train.train

    def warned(*args, **options):
        for _ in range(2):
            warnings.warn("the steps are odd", stacklevel=2)
        return real(*args, **options)

    monkeypatch.setattr(_train, "train", warned)
    result = train(tmp_path)
    assert result.exit_code == 0
    assert result.stderr.splitlines().count("warning: the steps are odd") == 1


def test_a_training_that_diverges_leaves_nothing_that_blocks_a_lower_rate(tmp_path):
    for every in (0, 1, 100):
        result = train_dense(tmp_path, "--lr", 1e8, "--save-every", every)
        assert_refused(result, "lower lr = 100000000.0")
        assert "warning" not in result.stderr.lower()
        assert not names(tmp_path)
    assert train(tmp_path).exit_code == 0


# -- what cannot be written


def no_space(folder: Path):
    """A disk that is full in one folder."""
    real = os.replace

    def replace(source, target):
        if Path(target).parent == folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    return replace


@pytest.mark.parametrize("save_every", [0, 100])
def test_a_finished_training_survives_a_full_disk(finished, tmp_path, monkeypatch, save_every):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    real = runs.save_model

    def full_from_now_on(path, *args, **options):
        if path.parent == folder:  # the pictures are there already
            monkeypatch.setattr(os, "replace", no_space(folder))
        real(path, *args, **options)

    monkeypatch.setattr(runs, "save_model", full_from_now_on)
    result = train(folder, "--save-every", save_every)
    assert_refused(result, "no space left", "model.pt", "the results are in", str(elsewhere))
    assert names(folder) == ["checkpoint.pt"] if save_every else not folder.exists()
    assert "clean accuracy" in result.stdout
    (rescued,) = elsewhere.iterdir()
    assert names(rescued) == FILES
    settings = runs.load_results(rescued)["settings"]
    assert settings == runs.load_results(finished)["settings"]
    one, other = (torch.load(x / "model.pt")["state"] for x in (finished, rescued))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_with_a_checkpoint_it_is_not_trained_again_after_a_full_disk(tmp_path, monkeypatch):
    cut_off(tmp_path, monkeypatch)
    assert checkpoint.peek(tmp_path / "checkpoint.pt")["schedule"]["last_epoch"] == STEPS
    monkeypatch.setattr("lrmanifold.cli._commands.load", lambda name, root: few_digits())
    result = train(tmp_path)
    assert f"resumes after step {STEPS} of {STEPS}" in result.stderr
    assert names(tmp_path) == FILES


def test_a_disk_that_fills_up_during_the_training_is_one_line(tmp_path, monkeypatch):
    real, saved = checkpoint.save, []

    def save(path, *args, **options):
        if len(saved) == 2:
            monkeypatch.setattr(os, "replace", no_space(tmp_path))
        saved.append(path)
        real(path, *args, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    result = train(tmp_path, "--save-every", 5)
    assert_refused(result, "no space left", "checkpoint.pt", "goes on after step 10")


@pytest.mark.parametrize("code", ["EACCES", "EROFS", "ENOSPC"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_training(
    tmp_path, monkeypatch, code
):
    real = os.open

    def refusing(path, flags, *args, **options):
        if flags & os.O_CREAT and Path(path).parent == tmp_path:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(path))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr("lrmanifold.cli._train.train", lambda *_, **__: pytest.fail("it trained"))
    result = train(tmp_path)
    assert_refused(result, "choose another folder by --out", str(tmp_path))
    assert not names(tmp_path)


def test_a_new_folder_that_stays_empty_is_removed(tmp_path):
    result = train(tmp_path / "a" / "b", "--method", "dense", "--rank", 3)
    assert_refused(result, "takes no rank")
    assert_refused(train_dense(tmp_path / "a" / "b", "--lr", 1e30), "lower lr")
    assert not names(tmp_path)


def test_system_errors_are_said_in_one_line_with_a_way_out():
    for code, words in (
        (errno.ENOSPC, "no space left (f): free some, or go away"),
        (errno.EDQUOT, "no space left (f)"),
        (errno.EROFS, "no permission to write (f): go away"),
        (errno.ENOTDIR, "Not a directory (f)"),
    ):
        assert words in explained(OSError(code, os.strerror(code), "f"), "go away")
    assert explained(OSError(errno.EACCES, "", "f")) == "no permission (f)"
    assert explained(OSError(errno.ENOSPC, "", "f")) == "no space left (f): free some"
    assert "lower --batch-size" in explained(torch.OutOfMemoryError("CUDA out of memory. Tried"))


# -- the terminal


def test_a_reader_that_goes_away_is_no_error(finished):
    command = f"{sys.executable} -m lrmanifold.cli report {finished} | head -c 10"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert len(result.stdout) == 10
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


def test_a_terminal_without_greek_letters_is_no_error(finished):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lrmanifold.cli", "report", str(finished)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "256 x 64" in result.stdout


# -- certified runs


def test_a_certified_run_goes_on_with_its_own_radius_only(tmp_path, monkeypatch):
    options = ("--certified", "--model", "mlp-maxmin", "--eps", "0.1", "--rank", 8)
    cut_off(tmp_path, monkeypatch, *options)
    monkeypatch.setattr("lrmanifold.cli._commands.load", lambda name, root: few_digits())
    other = (*options[:4], "0.3", *options[5:])
    assert_refused(train(tmp_path, *other), "with objective certified loss, eps 0.12 instead of")
    result = train(tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert f"resumes after step {STEPS} of {STEPS}" in result.stderr
    assert names(tmp_path) == sorted([*FILES, "certificate.png"])
    assert train(tmp_path, "--force").exit_code == 0
    assert names(tmp_path) == FILES  # no picture of the other run stays
