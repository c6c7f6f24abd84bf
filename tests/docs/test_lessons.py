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


# Mistakes in the solution of each exercise, as (right, wrong): the check must reject every one.
MISTAKES = {
    "1-rank-one": [("Vh[0]", "Vh[:, 0]"), ("s[0] * ", ""), ("s[0]", "s[1]")],
    "2-tangent-spaces": [
        (" - U @ (U.mT @ right)", ""),
        ("U @ (U.mT @ right)", "right"),
        ("left + right - U @ (U.mT @ right)", "U @ (U.mT @ right)"),
    ],
    "3-small-singular-values": [
        ("V @ S.mT", "V @ S"),
        ("F.mT @ U", "F.mT @ torch.linalg.qr(U @ S + F @ V).Q"),
        ("(U @ S @ V.mT + F)", "F"),
        ("return U1, U1.mT", "return 2 * U1, 0.5 * U1.mT"),
        (
            "    U1, V1 = torch.linalg.qr(K).Q, torch.linalg.qr(L).Q\n",
            "    P, _, Q = torch.linalg.svd(U @ S @ V.mT + F)\n"
            "    U1, V1 = P[:, : len(S)], Q.mT[:, : len(S)]\n",
        ),
    ],
    "4-well-conditioned": [
        ("kappa * (s - kappa * b)", "(s - kappa * b)"),
        ("s.max()\n    for", "1.0\n    for"),
        ("s.clamp(b, kappa * b)", "s.clamp(b, b * (1 + 0.9 * (kappa - 1)))"),
        ("for _ in range(80)", "for _ in range(8)"),
        ("s.clamp(b, kappa * b)", "s.clamp(s.max() / kappa, s.max())"),
        ("if s.max() <= kappa * s.min()", "if s.max() <= 10 * kappa * s.min()"),
    ],
    "5-robust-training": [
        ("min(m * n, (m + rank + n) * rank)", "(m + rank + n) * rank"),
        ("(m + rank + n) * rank", "(m + n) * rank"),
        ("(m + rank + n) * rank", "(m + n - rank) * rank"),
        ("min(m * n, (m + rank + n) * rank) if", "(m + rank + n) * rank if"),
    ],
    "6-attacks": [
        (".clamp(0, 1)", ""),
        ("eps *", "1.05 * eps *"),
        ("eps *", "0.9 * eps *"),
        ("eps *", "0.05 *"),
        ("x + eps", "x - eps"),
        (".sign()", ""),
        (".sign()", ".div(gradient.abs().max())"),
        ("(model(x), y)", "(model(x), model(x).argmax(1))"),
        (".clamp(0, 1)", ".clamp(-1, 1)"),
    ],
    "7-approximation": [
        (" if a else t", " if a else 0.0"),
        ("eps * b", "eps * 3.0"),
        ("eps * b", "eps"),
        ("math.expm1(a * t) / a", "math.exp(a * t) / a"),
        ("math.expm1(a * t) / a", "math.expm1(a * 1.5) / a"),
        ("math.expm1(a * t) / a", "t * math.exp(a * t)"),
    ],
    "8-certificates": [
        ("(L * (W[y] - W[j]).norm())", "(W[y] - W[j]).norm()"),
        ("min(", "max("),
        ("z[y] - z[j]", "abs(z[y] - z[j])"),
        ("(L * (W[y] - W[j]).norm())", "(2**0.5 * L * W.norm(dim=1).max())"),
        ("/ (L * (W[y] - W[j]).norm())", "* L / (W[y] - W[j]).norm()"),
        ("(W[y] - W[j]).norm()", "(W[y] - W[j]).norm(1)"),
    ],
}  # fmt: skip


def mistaken(lesson, solution):
    """The solution with each of the mistakes."""
    for right, wrong in MISTAKES[lesson.stem]:
        assert right in solution, right
        yield solution.replace(right, wrong)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_all_cells_run(lesson, capsys):
    names = run(lesson, CELL)
    printed = capsys.readouterr().out
    verdicts = re.findall(r"\b(True|False)$", printed, flags=re.MULTILINE)
    assert printed.endswith("not yet\n")  # the exercise, before it is solved
    (solution,) = blocks(lesson, "python")
    exec(compile(solution, f"{lesson.name}, solution", "exec"), names)
    assert capsys.readouterr().out == "right\n"
    for wrong in mistaken(lesson, solution):
        exec(compile(wrong, f"{lesson.name}, wrong", "exec"), names)
        assert capsys.readouterr().out == "not yet\n", wrong
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
