"""What stands in the folder of a run: files of one network, and how it was made."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from command_line import FILES, assert_refused, few_digits, invoke, names, train, use_few_digits

from lrmanifold import checkpoint
from lrmanifold.cli import _commands, _train
from lrmanifold.experiments import methods, resume, runs
from lrmanifold.experiments.methods import KINDS, Method
from lrmanifold.experiments.models import mlp
from lrmanifold.experiments.training import Settings


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    use_few_digits(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short training."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        images = few_digits()
        patch.setattr(_commands, "load", lambda name, root: images)
        result = train(folder)
    assert result.exit_code == 0, result.output
    return folder


def copied(finished, folder) -> None:
    for name in FILES:
        (folder / name).write_bytes((finished / name).read_bytes())


@pytest.mark.parametrize("command", ["train", "demo"])
def test_force_leaves_no_certificate_of_the_network_before(finished, tmp_path, command):
    copied(finished, tmp_path)
    for data_set in ("", "-digits", "-mnist", "-fashion-mnist", "-cifar10"):
        for kind in ("json", "png"):
            (tmp_path / f"certificate{data_set}.{kind}").write_text("of the network before")
    (tmp_path / "certificate-of-mine.png").write_text("mine")
    demo = ("demo", "--epochs", 1, "--seeds", 1, "--rank", 8, "--force", "--out", tmp_path)
    result = invoke(*demo) if command == "demo" else train(tmp_path, "--seed", 1, "--force")
    assert result.exit_code == 0, result.output
    assert names(tmp_path) == sorted([*FILES, "certificate-of-mine.png"])


# -- the demo


DEMO = ("demo", "--epochs", 1, "--seeds", 1)


def text(result) -> str:
    return " ".join(result.output.split())


def test_the_demo_says_of_its_rates_which_were_tuned_and_which_were_given(tmp_path):
    own = text(invoke(*DEMO, "--out", tmp_path / "a"))
    tuned = "tuned for each on a validation split (at 20 epochs and rank 32)"
    assert f"Learning rate and weight decay, {tuned}: dense 0.1, 0.003; plain" in own
    given = text(invoke(*DEMO, "--lr", 0.02, "--out", tmp_path / "b"))
    assert f"Learning rate 0.02 for all, as given; weight decay, {tuned} at other rates" in given
    assert "at other rates: dense 0.003; plain low rank (A Bᵀ) 0.01;" in given


def test_a_demo_whose_networks_diverge_has_no_model_and_is_finished(tmp_path):
    words = (*DEMO, "--lr", 1e18, "--out", tmp_path)
    first = invoke(*words)
    assert first.exit_code == 0, first.output
    assert names(tmp_path) == ["results.json"]
    assert text(first).endswith(": results.json (no model.pt: tau = 0.1 diverged)")
    again = invoke(*words)
    assert again.exit_code == 0, again.output
    assert again.output.startswith("finished already: ")


def test_a_model_that_is_missing_is_still_missed(finished, tmp_path):
    copied(finished, tmp_path)
    (tmp_path / "model.pt").unlink()
    assert_refused(train(tmp_path), "no model.pt", "--force")


# -- what the results say


CERTIFIED = ("--certified", "--model", "mlp-maxmin", "--eps", "0.1", "--save-every", 0)


def test_a_certified_run_names_its_optimizer(tmp_path):
    assert train(tmp_path, *CERTIFIED).exit_code == 0
    results = runs.load_results(tmp_path)
    assert results["settings"]["optimizer"] == "adam"
    del results["settings"]["optimizer"]  # as older runs, which are the same
    runs.write_results(tmp_path / "results.json", results)
    again = train(tmp_path, *CERTIFIED)
    assert again.output.startswith("finished already: "), again.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--optimizer", "condlr"), "optimizer must be adam with certified, got 'condlr'"),
        (("--label-smoothing", 0.1), "label_smoothing must be 0 with certified"),
        (("--momentum", 0.9), "momentum belongs to optimizer condlr, got 0.9 with adam"),
    ],
)
def test_what_certified_training_would_ignore_is_refused(tmp_path, words, said):
    assert_refused(train(tmp_path / "run", *CERTIFIED, *words), said)
    assert not names(tmp_path)


@pytest.mark.parametrize("part", ["train_x", "test_x", "train_y", "test_y"])
def test_results_of_other_images_of_the_same_number_are_another_run(
    finished, tmp_path, monkeypatch, part
):
    folder = shutil.copytree(finished, tmp_path / "run")
    images = few_digits()
    other = dataclasses.replace(images, **{part: getattr(images, part).flip(0)})
    monkeypatch.setattr("lrmanifold.cli._commands.load", lambda name, root: other)
    kind = "images" if part.endswith("x") else "labels"
    assert_refused(train(folder), "results of another run", f"with {kind} (CRC-32) ", "--force")


def test_older_results_without_checksums_are_those_of_a_finished_run(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    results = runs.load_results(folder)
    for kind in ("images", "labels"):
        del results["data"][f"{kind} (CRC-32)"]
    runs.write_results(folder / "results.json", results)
    assert train(folder).output.startswith("finished already: ")


def test_the_seconds_are_those_of_all_sessions(tmp_path, monkeypatch):
    ticks, real = itertools.count(step=1000.0), _train._finish
    path = tmp_path / "checkpoint.pt"

    def cut_off(*_, **__):
        raise RuntimeError

    monkeypatch.setattr(_train, "_finish", cut_off)
    monkeypatch.setattr(resume, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    before = 0.0
    for _ in range(2):  # the second session has nothing to train, and still counts
        train(tmp_path, "--save-every", 5)
        assert checkpoint.peek(path)["seconds"] >= before + 1000
        before = checkpoint.peek(path)["seconds"]
    monkeypatch.setattr(_train, "_finish", real)
    assert train(tmp_path, "--save-every", 5).exit_code == 0
    assert before <= runs.load_results(tmp_path)["seconds"] < before + 100


def test_checkpoints_of_before_say_no_seconds_and_are_taken_up(tmp_path, monkeypatch):
    real, kept = checkpoint.save, []

    def save(path, model, optimizer, *, extra):
        kept.append(extra.pop("seconds"))
        real(path, model, optimizer, extra=extra)

    def cut_off(*_, **__):
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        patch.setattr(_train, "_finish", cut_off)
        train(tmp_path)
    assert kept
    result = train(tmp_path)
    assert result.exit_code == 0, result.output
    assert "resumes after step" in result.stderr


def test_a_damaged_model_is_not_finished(finished, tmp_path):
    copied(finished, tmp_path)
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: len(whole) // 2])
    assert_refused(train(tmp_path), "model.pt: is damaged", "--out", "--force")
    assert train(tmp_path, "--force").exit_code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_of_every_method_comes_back(tmp_path, kind, device):
    tau, tol = (0.1 if kind == "condlr" else None), (0.1 if kind == "robust_dlrt" else None)
    method, images = Method(kind, kind, tau, tol=tol), few_digits()
    trained = methods.train(
        method, lambda: mlp(64, 10), images, 8, Settings(2, 64), exclude="fc3", device=device
    )
    path = tmp_path / "model.pt"
    runs.save_model(path, trained.model, architecture="mlp", method=method, data=images)
    loaded, own = runs.load_model(path), trained.model.cpu().eval()
    assert torch.equal(loaded(images.test_x), own(images.test_x))
    assert str(loaded) == str(own)
