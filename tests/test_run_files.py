"""What stands in the folder of a run: files of one network, and how it was made."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from command_line import assert_refused, few_digits, invoke, names, train

from lrmanifold import _commands
from lrmanifold.experiments import demo as demos

FILES = ["accuracy.png", "model.pt", "results.json", "spectra.png"]


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    images = few_digits()
    monkeypatch.setattr(_commands, "load", lambda name, root: images)
    monkeypatch.setattr(demos, "load", lambda name: images)


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
