"""Who is alone at a result, and when kept images are stale."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import _shared
from lrmanifold.experiments import data as datasets
from lrmanifold.experiments.data import Dataset, load


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(_shared, "SCRATCH", tmp_path / "scratch")


def test_who_comes_second_goes_on_or_waits_until_the_first_is_done_or_dead(tmp_path):
    path = tmp_path / "a.json"
    code = (
        "import sys; from pathlib import Path; from benchmarks import _shared\n"
        "_shared.SCRATCH = Path(sys.argv[1])\n"
        "with _shared.alone(Path(sys.argv[2])): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(_shared.SCRATCH), str(path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"in\n"
    with _shared.alone(path, wait=False) as mine, _shared.alone(tmp_path / "b.json") as other:
        assert (mine, other) == (False, True)
    first.kill()
    with _shared.alone(path) as mine:
        assert mine
    first.communicate()
    with pytest.raises(ValueError, match="no"), _shared.alone(path):
        raise ValueError("no")
    with _shared.alone(path, wait=False) as mine:
        assert mine
    assert not path.exists()


def test_decoded_images_are_kept_to_the_bit_until_the_files_change(tmp_path, monkeypatch):
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    x, y = pixels.float().div_(255), torch.arange(6)
    data = Dataset("cifar10", x, y, x[:2], y[:2], 10, tuple("abcdefghij"), (0.5,) * 3, (0.2,) * 3)
    roots = [tmp_path / name for name in ("one", "other")]
    for root in roots:
        root.mkdir()
        (root / "train.npz").write_bytes(b"1")
    calls = []
    monkeypatch.setattr(datasets, "load", lambda *_: calls.append(1) or data)
    for _ in range(2):
        found = _shared.load("cifar10", str(roots[0]))
        for field in dataclasses.fields(data):
            a, b = getattr(found, field.name), getattr(data, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert len(calls) == 1
    _shared.load("cifar10", str(roots[1]))  # another folder
    assert len(calls) == 2
    os.utime(roots[0] / "train.npz", ns=(1, 1))
    _shared.load("cifar10", str(roots[0]))
    assert len(calls) == 3


def test_digits_take_no_folder(tmp_path):
    found, plain = _shared.load("digits", str(tmp_path)), load("digits")
    assert torch.equal(found.train_x, plain.train_x)
