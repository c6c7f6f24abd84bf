"""An empty word, as of a shell variable that is not set, is no default."""

from __future__ import annotations

import os

import pytest

from lrmanifold import cli

pytest.importorskip("typer")
pytest.importorskip("sklearn")

TRAIN = {
    "--tau": "tau must be a finite number >= 0",
    "--rank": "rank must be a number",
    "--out": "out must be a path, got ''",
    "--root": "root must be a path, got ''",
    "--eps": "eps must be positive numbers",
    "--exclude": "exclude pattern '' matches no layer",
    "--adversarial": "adversarial must be one of",
    "--optimizer": "optimizer must be one of condlr, adam, got ''",
    "--device": "device must be cpu, cuda or cuda:N, got ''",
    "--data": "data must be one of",
    "--model": "model must be one of",
    "--method": "method must be one of",
}


def refused(capsys, *words: str) -> str:
    assert cli.main(list(words)) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("option", TRAIN)
def test_of_train(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert TRAIN[option] in refused(capsys, "train", option, "")
    assert not os.listdir(tmp_path)


def test_of_radii_to_train_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "eps must be positive" in refused(capsys, "train", "--certified", "--eps", "")
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = "train --epochs 1 --batch-size 512 --save-every 0 --out"
    assert cli.main([*words.split(), str(folder)]) == 0
    return folder


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--eps", "eps must be positive numbers"),
        ("--data", "data must be one of"),
        ("--root", "root must be a path, got ''"),
    ],
)
def test_of_certify(run, option, said, capsys):
    before = sorted(os.listdir(run))
    assert said in refused(capsys, "certify", str(run), "--no-attack", option, "")
    assert sorted(os.listdir(run)) == before


@pytest.mark.parametrize("words", ["report", "certify", "demo --out"])
def test_of_paths(words, run, monkeypatch, capsys):
    monkeypatch.chdir(run)  # the run that an empty path would mean
    assert "must be a path, got ''" in refused(capsys, *words.split(), "")
