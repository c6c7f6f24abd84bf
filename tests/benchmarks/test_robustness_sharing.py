"""Families of a plan in several processes: the same rows, none torn, images decoded once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn")
from tiny_plan import TINY, write

from benchmarks.report import page
from benchmarks.report.results import read
from benchmarks.robustness.runner import Runner
from benchmarks.robustness.share import AGAIN, decoded
from benchmarks.robustness.table import Table
from lrmanifold.experiments import data as datasets
from lrmanifold.experiments.data import Dataset


def test_processes_share_a_plan_and_its_tables(tmp_path):
    write(tmp_path / "one" / "tiny", TINY)
    one = Runner(tmp_path / "one" / "tiny", tmp_path / "one", unregistered=True, log=lambda _: None)
    assert one.go()
    folder = write(tmp_path / "tiny", TINY).parent
    words = ["tiny", "--processes", "2", "--unregistered", "--results", tmp_path]
    words += ["--scratch", tmp_path / "scratch", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.robustness", *map(str, words)]
    assert subprocess.run([*command, "--minutes", "0"]).returncode == AGAIN
    assert not (folder / "trials.jsonl").exists()
    assert subprocess.run(command).returncode == 0
    for kind in ("trials", "runs"):
        ours, alone = (
            {row["key"]: row for row in Table(where / f"{kind}.jsonl").rows()}
            for where in (folder, one.folder)
        )
        assert ours.keys() == alone.keys()
        assert all(ours[key].get("clean") == alone[key].get("clean") for key in ours)
    assert read(folder) is not None  # the report finds all families


def test_rows_of_many_processes_stay_whole(tmp_path):
    code = (
        "import sys; from benchmarks.robustness.table import Table\n"
        "for i in range(40):\n"
        "    Table(sys.argv[1]).append({'key': sys.argv[2] + str(i), 'text': 20000 * 'x'})"
    )
    path = tmp_path / "rows.jsonl"
    work = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [process.wait() for process in work] == [0, 0]
    assert len(path.read_text().splitlines()) == 80
    assert {row["key"] for row in Table(path).rows()} == {
        f"{n}{i}" for n in "ab" for i in range(40)
    }


def test_decoded_images_are_kept_to_the_bit(tmp_path, monkeypatch):
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    x, y = pixels.float().div_(255), torch.arange(6)
    data = Dataset("cifar10", x, y, x[:2], y[:2], 10, tuple("abcdefghij"), (0.5,) * 3, (0.2,) * 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.npz").write_bytes(b"1")
    calls = []
    monkeypatch.setattr(datasets, "load", lambda *_: calls.append(1) or data)
    for _ in range(2):
        found = decoded(str(tmp_path / "data"), tmp_path / "scratch")
        assert torch.equal(found.train_x, x)
        assert torch.equal(found.test_x, x[:2])
        assert dataclasses.replace(found, train_x=x, test_x=x[:2]).mean == data.mean
    assert len(calls) == 1
    (tmp_path / "data" / "train.npz").write_bytes(b"other")
    decoded(str(tmp_path / "data"), tmp_path / "scratch")
    assert len(calls) == 2


def test_a_family_that_is_left_out_is_named_and_one_of_a_hypothesis_is_needed(tmp_path):
    write(tmp_path / "tiny", TINY)
    options = {"unregistered": True, "log": lambda _: None}
    assert Runner(tmp_path / "tiny", tmp_path, only="dense", **options).go()
    assert read(tmp_path / "tiny") is None
    assert Runner(tmp_path / "tiny", tmp_path, skip="wild", **options).go()
    found = read(tmp_path / "tiny")
    assert found is not None
    assert found.missing == ("wild",)
    text = page.write(found, tmp_path / "tiny").read_text()
    assert "Planned, and not run on the test images: wild." in text
