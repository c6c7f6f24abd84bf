"""What a run prints and stores, and how it is stopped."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from theory.__main__ import main
from theory.core import Claim, Source, inequality
from theory.outputs import check_places


def drawn(seed, dtype, device):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.rand((), generator=generator, dtype=dtype).to(device)}


def below_1(sample):
    return inequality(sample["x"], 1.0)


def claim(check=below_1) -> Claim:
    return Claim(
        id="group/name",
        title="x is below its bound",
        statement=r"x \le 1",
        hypotheses=("x drawn from [0, 1)",),
        source=Source("classical", "here"),
        sample=drawn,
        check=check,
        controls=(),
        trials=20,
    )


def run(*argv, claims=None):
    return main([str(a) for a in argv], claims=claims or [claim()])


def test_files_that_cannot_be_written_are_refused_before_the_run(tmp_path, capsys):
    def must_not_run(sample):
        pytest.fail("the run has begun")

    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for option in ("--json", "--csv", "--latex"):
        for path in ("folder", "file/x", "n" * 300):
            _refused(option, tmp_path / path, claims=[claim(must_not_run)])
            assert option in capsys.readouterr().err
    _refused("--plots", tmp_path / "file", claims=[claim(must_not_run)])
    _refused("--json", tmp_path / "a", "--csv", tmp_path / "x" / ".." / "a")
    assert "--csv must be another file than --json" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def _refused(*argv, **more):
    with pytest.raises(SystemExit) as stopped:
        run(*argv, **more)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("files", "folders"),
    [
        ({"--json": "a"}, {"--plots": "a"}),
        ({"--csv": "a", "--json": "a/run.json"}, {}),
        ({"--json": "a"}, {"--plots": "a/pictures"}),
    ],
)
def test_what_one_option_needs_as_a_folder_is_no_file_of_another(files, folders, tmp_path):
    with pytest.raises(ValueError, match=r"must be a file, got the folder .*a$"):
        check_places(*({k: tmp_path / v for k, v in x.items()} for x in (files, folders)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_device_or_a_pipe_is_refused_as_it_would_be_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"--json must be an ordinary file, got the device or"):
        check_places({"--json": tmp_path / "pipe"}, {})
    assert (tmp_path / "pipe").is_fifo()


def test_a_place_that_is_free_is_left_as_it_was(tmp_path):
    (tmp_path / "run.csv").write_text("old", encoding="utf-8")
    check_places({"--csv": tmp_path / "run.csv", "--json": None}, {"--plots": tmp_path})
    assert [p.name for p in tmp_path.iterdir()] == ["run.csv"]
    assert (tmp_path / "run.csv").read_text(encoding="utf-8") == "old"


def test_what_the_disk_has_no_room_for_at_the_end_is_kept_elsewhere(tmp_path, monkeypatch, capsys):
    import theory.outputs

    before = theory.outputs.write

    def full(path, content):
        if path.parent == tmp_path:
            raise OSError(28, "No space left on device")
        before(path, content)

    monkeypatch.setattr(theory.outputs, "write", full)
    assert run("--json", tmp_path / "run.json") == 2
    said = capsys.readouterr()
    assert "group/name" in said.out
    (line,) = said.err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'run.json'} cannot be written: No space left")
    kept = Path(line.rpartition("it is in ")[2].removesuffix(" instead"))
    assert json.loads(kept.read_text(encoding="utf-8"))["passed"] is True
    shutil.rmtree(kept.parent)


def test_list_and_replay_store_what_they_print(tmp_path, capsys):
    assert run("--list", "--json", tmp_path / "list.json") == 0
    (said,) = json.loads((tmp_path / "list.json").read_text(encoding="utf-8"))["claims"]
    assert (said["id"], said["statement"], said["tag"]) == ("group/name", r"x \le 1", "classical")
    capsys.readouterr()
    assert run("--replay", "name:3", "--json", tmp_path / "one.json") == 0
    assert (tmp_path / "one.json").read_text(encoding="utf-8") == capsys.readouterr().out


def _started(*argv, **more):
    root = Path(__file__).resolve().parents[2]
    argv = [sys.executable, "-m", "theory", *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, cwd=root, stdout=pipe, stderr=pipe, text=True, **more)


def test_a_reader_that_leaves_gets_silence_and_the_files_their_content(tmp_path):
    path = tmp_path / "run.json"
    process = _started("--only", "sin-theta", "--trials", "3", "--json", str(path))
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    process.stderr.close()
    assert json.loads(path.read_text(encoding="utf-8"))["passed"] is True


@pytest.mark.skipif(os.name == "nt", reason="no process groups")
@pytest.mark.parametrize("jobs", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_an_interrupt_is_one_line(jobs, tmp_path):
    # Minutes of work, and long before its end the terminal's Ctrl-C, which all processes get.
    options = ("--only", "geometry/[st]*", "--trials", "3000", "--jobs", jobs)
    # a job in the background of a shell inherits that Ctrl-C is ignored
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = _started(
        *options, "--plots", str(tmp_path / "new"), start_new_session=True, preexec_fn=heard
    )
    try:
        while not (tmp_path / "new").exists():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(3)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "stopped\n")
