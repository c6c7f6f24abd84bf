"""The commands in this process, on a part of the digits."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path

from typer.testing import CliRunner

from lrmanifold.cli._commands import app
from lrmanifold.experiments import data

OPTIONS = ("--epochs", 2, "--batch-size", 64, "--rank", 5)
STEPS = 20
FILES = ["accuracy.png", "model.pt", "results.json", "spectra.png"]


def few_digits() -> data.Dataset:
    whole = data.load("digits")
    part = {"train_x": whole.train_x[:640], "train_y": whole.train_y[:640]}
    part |= {"test_x": whole.test_x[:50], "test_y": whole.test_y[:50]}
    return dataclasses.replace(whole, **part)


def use_few_digits(monkeypatch) -> None:
    """The commands load them, and so does the demo."""
    images = few_digits()
    monkeypatch.setattr("lrmanifold.cli._commands.load", lambda name, root: images)
    monkeypatch.setattr("lrmanifold.experiments.demo.load", lambda name: images)


def invoke(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def train(folder: Path, *args: object):
    return invoke("train", *OPTIONS, *args, "--out", folder)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def assert_refused(result, *words: str) -> None:
    lines = result.stderr.splitlines()
    assert result.exit_code == 2, result.output
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[-1]


def read_only(monkeypatch, folder: Path) -> None:
    """As a file system that was mounted anew: nothing is made or removed there."""
    real_open, real_unlink = os.open, os.unlink

    def refuse(path) -> None:
        if Path(path).parent == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def opened(path, flags, *args, **options):
        if flags & os.O_CREAT:
            refuse(path)
        return real_open(path, flags, *args, **options)

    def unlinked(path, **options):
        refuse(path)
        real_unlink(path, **options)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "unlink", unlinked)
