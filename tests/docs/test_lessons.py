"""The lessons run, as scripts, and keep their promises to a teacher."""

from __future__ import annotations

import re

import pytest
import torch
from doc_code import CELL, LESSONS, blocks, run


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch, tmp_path):
    """No windows, no files, and torch's and matplotlib's defaults back afterwards."""
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    before = torch.get_default_dtype()
    with matplotlib.rc_context():
        yield
    torch.set_default_dtype(before)
    pyplot.close("all")


# What the cells must say, beside running at all.
VERDICTS = {"7-approximation": ["True", "False", "False", "False"]}  # wrong constants are rejected


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_all_cells_run(lesson, capsys):
    names = run(lesson, CELL)
    printed = capsys.readouterr().out
    verdicts = re.findall(r"\b(True|False)$", printed, flags=re.MULTILINE)
    assert printed.endswith("not yet\n")  # the exercise, before it is solved
    (solution,) = blocks(lesson, "python")
    exec(compile(solution, f"{lesson.name}, solution", "exec"), names)
    assert capsys.readouterr().out == "right\n"
    assert verdicts == VERDICTS.get(lesson.stem, ["True"] * len(verdicts))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_has_questions_solutions_and_a_download(lesson):
    text = lesson.read_text(encoding="utf-8")
    questions = re.findall(r"^\*\*(\d)\.\*\*", text, flags=re.MULTILINE)
    assert questions == [str(k + 1) for k in range(len(questions))]
    assert len(questions) >= 3
    assert (
        text.count('<details class="solution">') == text.count("</details>") == len(questions) + 1
    )
    assert text.count("## Exercise\n") == 1
    assert f"<{lesson.stem}.ipynb>" in text.replace("\n", " ")
