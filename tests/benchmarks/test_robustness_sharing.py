"""A plan in several processes: every row once and the same as in one, none torn."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("sklearn")
from tiny_plan import SMALL, write

from benchmarks.report import page
from benchmarks.report.results import read
from benchmarks.robustness.__main__ import main
from benchmarks.robustness.runner import Runner
from benchmarks.robustness.table import Table


@pytest.mark.slow
def test_processes_share_a_plan_and_its_tables(tmp_path, monkeypatch):
    write(tmp_path / "one" / "tiny", SMALL)
    one = Runner(tmp_path / "one" / "tiny", tmp_path / "one", unregistered=True, log=lambda _: None)
    assert one.go()
    folder = write(tmp_path / "tiny", SMALL).parent
    words = ["tiny", "--unregistered", "--results", tmp_path]
    words += ["--scratch", tmp_path / "scratch", "--threads", "1"]
    command = [sys.executable, "-m", "benchmarks.robustness", *map(str, words)]
    monkeypatch.setattr(sys, "argv", ["", *map(str, words), "--minutes", "0"])
    with pytest.raises(SystemExit, match="75"):
        main()
    assert not (folder / "trials.jsonl").exists()
    work = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in work]
    assert [process.returncode for process in work] == [0, 0]
    assert all("trial" in text for text in said)  # both had a share
    for kind in ("trials", "runs"):
        rows = [Table(where / f"{kind}.jsonl").rows() for where in (folder, one.folder)]
        ours, alone = ({row["key"]: row for row in some} for some in rows)
        assert len(rows[0]) == len(ours)  # none twice
        assert ours.keys() == alone.keys()
        assert all(ours[key].get("clean") == alone[key].get("clean") for key in ours)
    assert read(folder) is not None  # the report finds all families


@pytest.fixture
def gpu_script(tmp_path):
    """Runs the script for a GPU with these words, on the CPU."""
    write(tmp_path / "plans" / "tiny", SMALL)
    folders = {"OUT": str(tmp_path / "out"), "PLANS": str(tmp_path / "plans")}

    def run(*words, python=sys.executable):
        settings = {**os.environ, **folders, "DEVICE": "cpu", "PYTHON": python}
        command = ["bash", "benchmarks/robustness/gpu.sh", *words]
        return subprocess.run(command, env=settings, capture_output=True, text=True)

    return run


def test_the_script_for_a_gpu_ends_in_time_and_says_what_broke(tmp_path, gpu_script):
    assert gpu_script().returncode == 2
    assert gpu_script("0", "tiny:1").returncode == 0
    assert not (tmp_path / "out" / "tiny" / "runs.jsonl").exists()
    broken = gpu_script("5", "tiny:1", python="false")  # breaks as soon as it is started
    assert broken.returncode == 1
    assert broken.stderr.startswith("tiny: process 1 broke three times")


@pytest.mark.slow
def test_the_script_for_a_gpu_starts_as_many_as_it_is_told(tmp_path, gpu_script):
    done = gpu_script("5", "tiny:2")
    assert (done.returncode, done.stderr) == (0, "")
    assert read(tmp_path / "out" / "tiny") is not None


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


def test_a_family_that_is_left_out_is_named_and_one_of_a_hypothesis_is_needed(tmp_path):
    write(tmp_path / "tiny", SMALL)
    runner = Runner(tmp_path / "tiny", tmp_path, unregistered=True, log=lambda _: None)
    assert runner.go()
    rows = runner.rows.path.read_text().splitlines(keepends=True)
    there = [line for line in rows if '"family": "wild"' not in line]
    runner.rows.path.write_text("".join(x for x in there if '"family": "dense"' in x))
    assert read(tmp_path / "tiny") is None
    runner.rows.path.write_text("".join(there))
    found = read(tmp_path / "tiny")
    assert found is not None
    assert found.missing == ("wild",)
    text = page.write(found, tmp_path / "tiny").read_text()
    assert "Planned, and not run on the test images: wild." in text
