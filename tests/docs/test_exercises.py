"""Checks of exercises: every form of a right answer passes, every fault of form has its hint."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrmanifold.experiments.exercises import agree, exercise

ONES = torch.ones(2, 3)


@exercise
def doubled(answer):
    if not agree(answer(ONES, shape=(2, 3)), 2 * ONES):
        return "it must be twice as much"
    return None


@exercise
def halves(answer):
    left, right = answer(ONES, shape=[(2,), ()])
    return None if agree(left.sum(), 2.0) and agree(right, 1.0) else "halves"


@pytest.mark.parametrize(
    "form",
    [
        lambda a: 2 * a,
        lambda a: (2 * a).half(),
        lambda a: (2 * a).requires_grad_(),
        lambda a: 2 * a.numpy(),
        lambda a: (2 * a).tolist(),
        lambda a: np.float32(2) * np.asarray(a),
        lambda a: 2 * a.requires_grad_(),
    ],
)
def test_a_right_answer_passes_in_every_form(form, capsys):
    doubled(form)
    assert capsys.readouterr().out == "right\n"


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda a: 3 * a, "it must be twice as much"),
        (lambda a: None, "returns None"),
        (lambda a: (2 * a).T, "must have the shape (2, 3), got (3, 2)"),
        (lambda a: a.mul_(2), "changes its argument in place"),
        (lambda a: a * torch.nan, "NaN or Inf"),
        (lambda a: 2 * a / 0, "NaN or Inf"),
        (lambda a: {"a": 2 * a}, "must be an array or a tensor, got a dict"),
        (lambda a: "2 a", "must be an array or a tensor, got a str"),
    ],
)
def test_a_wrong_one_gets_its_hint(wrong, hint, capsys):
    doubled(wrong)
    out = capsys.readouterr().out
    assert out.startswith("not yet: ")
    assert hint in out
    assert torch.equal(ONES, torch.ones(2, 3))  # the check's own data stay


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda a: a, "must return 2 results, got a Tensor"),
        (lambda a: (a[:, 0],), "must return 2 results, got a tuple of 1"),
        (lambda a: (a[:, 0], a), "result 2 must have the shape ()"),
    ],
)
def test_several_results_are_counted(wrong, hint, capsys):
    halves(lambda a: [a[:, 0], 1])
    assert capsys.readouterr().out == "right\n"
    halves(wrong)
    assert hint in capsys.readouterr().out


def test_errors_of_the_function_are_its_own():
    with pytest.raises(ZeroDivisionError):
        doubled(lambda a: 1 / 0)


@given(st.floats(1e-6, 1e6), st.floats(-1.0, 1.0))
def test_agree_is_relative_and_never_takes_nan(size, off):
    right = size * torch.tensor([3.0, 4.0], dtype=torch.float64)
    got = right + off * 5.0 * size * torch.tensor([0.0, 1.0], dtype=torch.float64)
    if abs(abs(off) - 1e-5) > 1e-9:
        assert agree(got, right) == (abs(off) < 1e-5)
    assert not agree(torch.nan * right, right)
