"""``lrmanifold train --certified`` and ``lrmanifold certify``: what they write and refuse."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_line import read_only

from lrmanifold import certify as certify_package
from lrmanifold import cli
from lrmanifold._lock import locked
from lrmanifold.cli import _certify as command
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
    wanted = ["0.05", "0.2"] if words else ["0.1", "0.3"]  # those it was trained for
    assert f"{float(wanted[1]):.4g} " in out
    assert set(wanted) <= set(found["verified"])
    assert found["data"]["name"] == "digits"
    # the same numbers as the library's
    model = runs.load_model(folder)
    from lrmanifold import certify

    digits = load("digits")
    test = (digits.test_x, digits.test_y)
    again = certify.verified_accuracy(model, test, [float(e) for e in wanted])
    assert list(again["verified"].values()) == [found["verified"][e] for e in wanted]


def certify(folder, *words):
    assert cli.main(["certify", str(folder), *words]) == 0
    return json.loads((folder / "certificate.json").read_text())


def copied(folder, tmp_path, certified=True):
    """The run once more, with nothing certified beside its training."""
    for name in ("model.pt", "results.json"):
        shutil.copy(folder / name, tmp_path / name)
    if not certified:
        results = runs.load_results(tmp_path)
        del results["certificate"], results["settings"]["certified"]
        runs.write_results(tmp_path / "results.json", results)
    return tmp_path


def test_radii_certified_before_stay(folder, tmp_path, capsys):
    run = copied(folder, tmp_path)
    trained = runs.load_results(run)["certificate"]
    found = certify(run, "--eps", ".05", "--no-attack")
    assert list(found["verified"]) == ["0.05", "0.1", "0.3"]
    assert found["attacked"] == trained["attacked"]
    assert found["attack"] == trained["attack"]
    assert max(map(float, found["curve"])) == pytest.approx(0.45)
    assert "radii of before are kept: 0.1, 0.3" in capsys.readouterr().out
    again = certify(run, "--eps", ".2,.05", "--no-attack")
    assert list(again["verified"]) == ["0.05", "0.1", "0.2", "0.3"]
    assert again["verified"]["0.1"] == trained["verified"]["0.1"]


def test_a_run_that_was_not_trained_for_radii_gets_the_usual_ones(folder, tmp_path):
    found = certify(copied(folder, tmp_path, certified=False), "--no-attack")
    assert list(found["verified"]) == ["0.1", "0.2", "0.4"]


def test_nothing_proved_comes_with_a_way_out(folder, tmp_path, capsys):
    certify(copied(folder, tmp_path), "--eps", "7", "--no-attack")
    assert "Nothing is proved at these radii: give smaller ones" in capsys.readouterr().out
    certify(tmp_path, "--eps", "0.1", "--no-attack")
    assert "Nothing is proved" not in capsys.readouterr().out


def test_certificates_of_another_network_are_not_mixed_in(folder, tmp_path, capsys):
    run = copied(folder, tmp_path, certified=False)
    old = certify(run, "--eps", ".07", "--no-attack")
    old["bound"] *= 1.01
    (run / "certificate.json").write_text(json.dumps(old))
    found = certify(run, "--eps", ".05", "--no-attack")
    assert list(found["verified"]) == ["0.05"]
    assert "of another network, its radii are left out: 0.07" in capsys.readouterr().out


def test_other_data_have_a_certificate_of_their_own(folder, tmp_path, monkeypatch):
    run = copied(folder, tmp_path)
    mine = certify(run, "--eps", ".1", "--no-attack")
    digits = load("digits")
    monkeypatch.setattr(command, "load", lambda name, root: digits)
    assert certify(run, "--eps", ".2", "--no-attack", "--data", "mnist") == mine
    other = json.loads((run / "certificate-mnist.json").read_text())
    assert list(other["verified"]) == ["0.2"]
    assert (run / "certificate-mnist.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--eps -1", "eps"), ("--eps 0", "eps"), ("--eps large", "eps"), ("--eps inf", "eps"),
        ("--data letters", "data"), ("--root nowhere", "root"),
        ("--eps 0.1234567 --eps 0.1234568", "eps must be numbers that differ in 6 digits"),
    ],
)  # fmt: skip
def test_wrong_words_are_one_line(folder, words, said, capsys):
    assert cli.main(["certify", str(folder), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def refused(run, capsys, *words: str) -> str:
    """The one line of an error; nothing was proved before it, and no file has changed."""
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert cli.main(["certify", str(run), "--no-attack"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before
    return error


@pytest.mark.parametrize("name", ["certificate.json", "certificate.png"])
def test_a_folder_in_the_place_of_a_certificate_is_refused_at_once(folder, tmp_path, capsys, name):
    run = copied(folder, tmp_path)
    (run / name).mkdir()
    assert "--out" not in refused(run, capsys, f"{name} is a folder", "remove it")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"verified": {"abc": 1}}', "a radius in verified must be a finite number > 0, got 'abc'"),
        ('{"verified": {"0.1": "much"}}', "verified at 0.1 must be a finite number in [0, 1]"),
        ('{"verified": {"0.1": 2}}', "verified at 0.1 must be a finite number in [0, 1], got 2"),
        ('{"verified": {"0.1": 1}, "attacked": 3}', "attacked must be an object"),
        ('{"verified": {"0.1": 1}, "bound": NaN}', "bound must be a finite number, got nan"),
        ('{"verified": {"0.1": 1}, "attack": 7}', "attack must be a string, got 7"),
        ('{"verified": 3}', "verified must be an object"),
        ("{}", "verified must be an object"),
        ("[1]", "it must be an object with certified radii, got [1]"),
        ('{"verified": {"0.1": 1}', "Expecting"),
        ("", "Expecting value"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_certificate_is_refused_at_once_and_not_overwritten(
    folder, tmp_path, capsys, text, why
):
    run = copied(folder, tmp_path)
    (run / "certificate.json").write_text(text)
    refused(run, capsys, "certificate.json: is damaged (", why, "remove it")
    (run / "certificate.json").unlink()
    assert list(certify(run, "--eps", "0.1", "--no-attack")["verified"]) == ["0.1", "0.3"]


def test_a_folder_that_cannot_be_written_is_refused_at_once(folder, tmp_path, capsys, monkeypatch):
    run = copied(folder, tmp_path)
    read_only(monkeypatch, run)
    error = refused(run, capsys, "no permission to write", "copy model.pt and results.json")
    assert "--out" not in error


def test_what_was_proved_is_not_lost_to_a_folder_that_becomes_read_only(
    folder, tmp_path, capsys, monkeypatch
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    copied(folder, run)
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    real = command.certificate

    def proved(*args, **options):
        read_only(monkeypatch, run)
        return real(*args, **options)

    monkeypatch.setattr(command, "certificate", proved)
    assert cli.main(["certify", str(run), "--no-attack"]) == 2
    out, error = capsys.readouterr()
    assert "proved %" in out
    (rescued,) = elsewhere.iterdir()
    assert f"the results are in {rescued} instead" in error
    assert "--out" not in error
    assert sorted(p.name for p in rescued.iterdir()) == ["certificate.json", "certificate.png"]


def test_no_certificate_is_written_while_a_training_replaces_the_network(folder, tmp_path, capsys):
    run = copied(folder, tmp_path)
    with locked(run, "lrmanifold train, CondLR tau=0.1 on digits"):
        refused(run, capsys, "is in use by process", "lrmanifold train, CondLR tau=0.1 on digits")


def test_results_that_lack_their_parts_are_one_line(folder, tmp_path, capsys):
    run = copied(folder, tmp_path)
    results = runs.load_results(run)
    for part, value in (("settings", 3), ("settings", {"data": "digits", "certified": ["a"]})):
        runs.write_results(run / "results.json", {**results, part: value, "data": None})
        refused(run, capsys, "results.json")
    runs.write_results(run / "results.json", {**results, "certificate": {"verified": 3}})
    refused(run, capsys, "its certificate is damaged (verified must be an object")


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


@pytest.mark.parametrize("at_the_end", [False, True])
def test_weights_that_overflow_a_bound_are_one_line(at_the_end, tmp_path, capsys, monkeypatch):
    """In training, or by the last step; no checkpoint is left to end there again."""
    if at_the_end:

        def overflows(*_, **__):
            raise certify_package.BoundError("fc1: its bound must be finite, got inf")

        monkeypatch.setattr(command.certify, "lipschitz", overflows)
    rate = "0.01" if at_the_end else "1e30"
    run = tmp_path / "run"
    words = f"train --certified --epochs 1 --save-every 3 --lr {rate} --out {run}"
    assert cli.main(words.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "bound must be finite" in error
    assert f"lower lr = {float(rate):g}" in error
    assert not (run / "checkpoint.pt").exists()


def test_a_certificate_that_an_attack_contradicts_offers_no_way_to_go_on(
    tmp_path, capsys, monkeypatch
):
    def contradicted(*_, **__):
        raise certify_package.CertificationError("an attack changed the class of 1 proved image")

    monkeypatch.setattr(command.certify, "verified_accuracy", contradicted)
    words = f"train --certified --epochs 1 --save-every 3 --out {tmp_path / 'run'}"
    assert cli.main(words.split()) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "error: an attack changed the class of 1 proved image"
