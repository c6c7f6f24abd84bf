"""What stands in the folder of a run: files of one network, and how it was made."""

from __future__ import annotations

import pytest

pytest.importorskip("typer")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from command_line import few_digits, invoke, names, train

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
