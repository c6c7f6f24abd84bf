"""Every argument of a wrong type or value is refused by name: the fuzz script, a part of it."""

from __future__ import annotations

import random

import hostile_arguments as fuzz
import pytest


def assert_nothing_found(calls) -> None:
    findings = fuzz.run(calls)
    assert not findings, "\n".join(map(str, findings))


def test_300_hostile_calls_are_refused_by_name():
    assert_nothing_found(random.Random(0).sample(fuzz.calls(), 300))


@pytest.mark.slow
def test_all_hostile_calls_are_refused_by_name():
    assert_nothing_found(fuzz.calls())


def test_the_fuzz_finds_what_it_is_meant_to_find():
    def call(value):
        if value is None:
            raise TypeError("something is wrong")
        return value.shape

    argument = fuzz.Argument("f", "size", "tensor", call)
    kinds = {fuzz.attempt(argument, v).kind for v in (None, 3, [1.0])}
    assert kinds == {"unnamed", "internal"}
    anything = fuzz.Argument("f", "size", "tensor", lambda value: value)
    assert fuzz.attempt(anything, "x").kind == "silent"
