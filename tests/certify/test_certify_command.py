"""``lrmanifold train --certified`` and ``lrmanifold certify``: what they write and refuse."""

from __future__ import annotations

import json

import pytest
import torch

from lrmanifold import cli
from lrmanifold.experiments import methods, models, runs
from lrmanifold.experiments.data import load
from lrmanifold.experiments.training import Settings

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run trained for certificates."""
    path = tmp_path_factory.mktemp("runs") / "proved"
    words = "train --certified --eps 0.1,0.3 --model mlp-maxmin --epochs 6 --save-every 0 --out"
    assert cli.main([*words.split(), str(path)]) == 0
    return path


def test_a_certified_run_has_its_certificate(folder):
    results = runs.load_results(folder)
    found = results["certificate"]
    assert results["settings"]["certified"] == [0.1, 0.3]
    assert results["settings"]["method"]["tau"] == 0.0
    for eps in ("0.1", "0.3"):
        assert found["verified"][eps] <= found["attacked"][eps] <= found["clean"]
    assert found["verified"]["0.1"] > 0.5
    assert (folder / "certificate.png").stat().st_size > 5000
    assert [row["kind"] for row in found["lipschitz"]["rows"]][2:4] == ["Flatten", "LowRankLinear"]


@pytest.mark.parametrize("words", ["--eps .05 .2", "--eps .05,.2", "--eps .2 --eps .05", ""])
def test_certify_takes_radii_in_any_form(folder, words, capsys):
    options = [] if words else ["--no-attack"]
    assert cli.main(["certify", str(folder), *words.split(), *options]) == 0
    out = capsys.readouterr().out
    assert "l2 Lipschitz constant <=" in out
    assert "proved %" in out
    assert ("under PGD" in out) == bool(words)
    found = json.loads((folder / "certificate.json").read_text())
    wanted = ["0.05", "0.2"] if words else ["0.1", "0.2", "0.4"]
    assert list(found["verified"]) == wanted
    assert found["data"]["name"] == "digits"
    # the same numbers as the library's
    model = runs.load_model(folder)
    from lrmanifold import certify

    digits = load("digits")
    test = (digits.test_x, digits.test_y)
    again = certify.verified_accuracy(model, test, [float(e) for e in wanted])
    assert list(again["verified"].values()) == list(found["verified"].values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--eps -1", "eps"), ("--eps 0", "eps"), ("--eps large", "eps"), ("--eps inf", "eps"),
        ("--data letters", "data"), ("--root nowhere", "root"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line(folder, words, said, capsys):
    assert cli.main(["certify", str(folder), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    assert cli.main(["certify", str(tmp_path / "none")]) == 2
    assert "lrmanifold train" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dense", "factors", "svd"])
def test_every_method_can_be_trained_for_certificates(kind, tmp_path):
    words = f"train --certified --method {kind} --epochs 1 --save-every 0 --out {tmp_path / kind}"
    assert cli.main(words.split()) == 0
    assert "certificate" in runs.load_results(tmp_path / kind)


def test_a_certified_training_goes_on_to_the_bit(tmp_path):
    digits = load("digits")
    how = methods.Method("τ = 0", "condlr", 0.0)

    def train(stop: int | None, checkpoint=None):
        done = [0]

        def step():
            done[0] += 1
            if done[0] == stop:
                raise KeyboardInterrupt

        return methods.train(
            how, lambda: models.mlp(64, 10, (24, 24)), digits, 6, Settings(2, 64, 0.01),
            certified=0.2, on_step=step, checkpoint=checkpoint, save_every=5, exclude="fc1",
        )  # fmt: skip

    whole = train(None)
    with pytest.raises(KeyboardInterrupt):
        train(20, tmp_path / "kept.pt")
    resumed = train(None, tmp_path / "kept.pt")
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
