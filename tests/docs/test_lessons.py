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
    "1-rank-one": [
        ("Vh[0]", "Vh[:, 0]"),
        ("U[:, 0]", "U[0]"),
        ("s[0] * ", ""),
        ("s[0]", "s[1]"),
        ("return s", "return -s"),
        ("return s[0]", "A *= 1.0 + 1e-3\n    return s[0]"),
    ],
    "2-tangent-spaces": [
        (" - U @ (U.mT @ right)", ""),
        ("U @ (U.mT @ right)", "right"),
        ("left + right - U @ (U.mT @ right)", "U @ (U.mT @ right)"),
        ("return ", "Z -= left\n    return "),
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
        ("if a else t", "if a else math.nan"),
    ],
    "8-certificates": [
        ("(L * (W[y] - W[j]).norm())", "(W[y] - W[j]).norm()"),
        ("min(", "max("),
        ("z[y] - z[j]", "abs(z[y] - z[j])"),
        ("(L * (W[y] - W[j]).norm())", "(2**0.5 * L * W.norm(dim=1).max())"),
        ("/ (L * (W[y] - W[j]).norm())", "* L / (W[y] - W[j]).norm()"),
        ("(W[y] - W[j]).norm()", "(W[y] - W[j]).norm(1)"),
        # the class itself among the others: 0 / 0
        ("return min", "return ((z[y] - z) / (L * (W[y] - W).norm(dim=1))).min()\n    min"),
    ],
}  # fmt: skip

# The same answers by other means: NumPy, float32, other formulas.
OTHER_ANSWERS = {
    "1-rank-one": """
import numpy as np
def solution(X):
    X = X.numpy().astype(np.float32)
    v = np.linalg.eigh(X.T @ X)[1][:, -1:]
    return X @ v @ v.T
""",
    "2-tangent-spaces": """
import numpy as np
def solution(u, v, a):
    u, v, a = (np.asarray(x) for x in (u, v, a))
    return a - (np.eye(8) - u @ u.T) @ a @ (np.eye(6) - v @ v.T)
""",
    "3-small-singular-values": """
def solution(U, S, V, F):
    U, S, V, F = (x.float() for x in (U, S, V, F))
    U1 = torch.linalg.svd(U @ S + F @ V, full_matrices=False).U
    V1 = torch.linalg.svd(V @ S.T + F.T @ U, full_matrices=False).U
    return [U1.numpy(), U1.T @ U @ S @ V.T @ V1 + U1.T @ F @ V1, V1]
""",
    "4-well-conditioned": """
import numpy as np
def solution(s, kappa):
    s, found = np.asarray(s), []
    if s[0] <= kappa * s[-1]:
        return s
    for p in range(7):
        for q in range(7 - p):
            if p + q:
                b = (kappa * s[:p].sum() + s[6 - q :].sum()) / (kappa**2 * p + q)
                found.append(np.clip(s, b, kappa * b))
    return min(found, key=lambda x: np.linalg.norm(x - s))
""",
    "5-robust-training": """
import numpy as np
def solution(layers, rank):
    m, n = np.array(layers).T
    return np.minimum(m * n, (m + n + rank) * rank).sum()
""",
    "6-attacks": """
def solution(model, x, y, eps):
    x.requires_grad_()
    torch.nn.CrossEntropyLoss(reduction="sum")(model(x), y).backward()
    return torch.clip(x + eps * x.grad.sign(), 0, 1).detach().numpy()
""",
    "7-approximation": """
import numpy as np
def solution(eps, a, b, t):
    return np.float32(eps * b) * (np.float32(t) if a == 0 else np.float32(np.exp(a * t) - 1) / a)
""",
    "8-certificates": """
import numpy as np
def solution(z, y, W, L):
    z, W = np.delete(z.numpy(), y, 0) - z[y].item(), np.delete(W.numpy(), y, 0) - W[y].numpy()
    return (-z / np.linalg.norm(W, axis=1)).min() / L
""",
}  # fmt: skip


def mistaken(lesson, solution):
    """The solution with each of the mistakes."""
    for right, wrong in MISTAKES[lesson.stem]:
        assert right in solution, right
        yield solution.replace(right, wrong)


# Long training, cut short; as they stand these run among the slow tests and when the site is built.
SHORTER = {
    "5-robust-training": {"epochs, steps = 12, 12 * 46": "epochs, steps = 2, 2 * 46"},
    "6-attacks": {"epochs=10": "epochs=2"},
    "8-certificates": {"epochs=20": "epochs=4"},
}


@pytest.mark.parametrize(
    ("lesson", "changes"),
    [pytest.param(p, SHORTER.get(p.stem, {}), id=p.stem) for p in LESSONS]
    + [
        pytest.param(p, {}, id=f"{p.stem}-whole", marks=pytest.mark.slow)
        for p in LESSONS
        if p.stem in SHORTER
    ],
)
def test_all_cells_run(lesson, changes, capsys):
    names = run(lesson, CELL, changes)
    printed = capsys.readouterr().out
    verdicts = re.findall(r"\b(True|False)$", printed, flags=re.MULTILINE)
    last = printed.splitlines()[-1]
    assert last.startswith("not yet: "), last  # the exercise, before it is solved
    (solution,) = blocks(lesson, "python")
    exec(compile(solution, f"{lesson.name}, solution", "exec"), names)
    assert capsys.readouterr().out == "right\n"
    exec(compile(OTHER_ANSWERS[lesson.stem], f"{lesson.name}, other", "exec"), names)
    names["check"](names["solution"])
    assert capsys.readouterr().out == "right\n"
    for wrong in mistaken(lesson, solution):
        exec(compile(wrong, f"{lesson.name}, wrong", "exec"), names)
        assert capsys.readouterr().out.startswith("not yet: "), wrong
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
