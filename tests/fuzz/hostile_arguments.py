"""Hostile values for every argument of the public functions: refused by name, or a finding.

Each function is called with good arguments but one. What a call may do: raise TypeError or
ValueError whose message names the argument. Anything else is a finding:

silent
    nothing raised: the value was taken for something else;
internal
    another error, from somewhere inside;
unnamed
    a TypeError or ValueError that does not say which argument is meant.

numpy's scalars, where numbers and flags belong, must work; a refusal counts as `refused`.

``python tests/fuzz/hostile_arguments.py`` prints the figures, a line for each finding.
"""

from __future__ import annotations

import collections
import contextlib
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from public_functions import functions
from torch import nn


class Foreign:
    """An object of somebody's own."""


NAN, INF = float("nan"), float("inf")
NEVER = [Foreign(), object, {1: 2}, b"x", 1j]
VALUES: dict[str, list[Any]] = {
    "number": [True, "1", None, [], (1.0,), NAN, INF, -INF, torch.ones(2), np.ones(2), *NEVER],
    "integer": [True, "3", None, [], (1,), 2.5, 2.0, NAN, INF, torch.ones(2), np.ones(2), *NEVER],
    "flag": [0, 1, None, "no", "", [], 2.0, torch.ones(2), *NEVER],
    "name": [0, 3, True, False, None, "", "zzz", [], (), 1.5, *NEVER],
    "module": [None, 3, "model", [], (), True, nn.Linear, torch.ones(2), len, *NEVER],
    "function": [3, "zzz", [], {}, 1.5, True, torch.ones(2), Foreign(), b"x"],
    "patterns": [3, True, 1.5, ["a", 3], [None], torch.ones(2), *NEVER],
    "tensor": [3, "x", [1.0], None, np.ones((4, 4)), True, *NEVER],
    "matrix": [torch.ones(6, 5, dtype=torch.long), torch.ones(6, 5) * 1j, torch.ones(5)],
    "device": ["toaster", 1.5, True, [], *NEVER],
    "dtype": ["float32", torch.int64, torch.complex64, torch.float8_e4m3fn, 32, True, *NEVER],
    "path": [3, 1.5, None, [], "", "a\0b", True, Foreign(), object, {1: 2}, 1j],
    "optimizer": [3, "x", [], True, nn.Linear(2, 2), torch.ones(2), *NEVER],
}
GOOD: dict[str, list[Any]] = {
    "number": [np.float32(0.5), np.float64(0.5)],
    "integer": [np.int64(2), np.uint8(2), np.int32(2)],
    "flag": [np.True_, np.False_],
}


@dataclass(frozen=True)
class Argument:
    """One argument of one function: its kind, and values beside those of the kind."""

    function: str
    name: str
    kind: str
    call: Callable[..., Any]
    optional: bool = False
    bad: tuple[Any, ...] = ()
    word: str = ""

    def values(self) -> Iterator[Any]:
        """The hostile ones."""
        for value in (*VALUES[self.kind], *self.bad):
            if not (value is None and self.optional):
                yield value


@dataclass(frozen=True)
class Finding:
    """A call that did something else than refuse by name."""

    kind: str
    function: str
    argument: str
    value: str
    told: str

    def __str__(self) -> str:
        return f"{self.kind:<9}{self.function}({self.argument}={self.value}): {self.told}"


def arguments() -> list[Argument]:
    """All arguments of all functions."""
    found = []
    for function, (call, good, kinds) in functions().items():
        for name, given in kinds.items():
            kind, more = (given, {}) if isinstance(given, str) else given

            def one(value: Any, call=call, good=good, name=name) -> Any:
                return call(**{**good, name: value})

            optional = more.get("optional", kind in ("device", "patterns", "optimizer"))
            more = {k: v for k, v in more.items() if k != "optional"}
            found.append(Argument(function, name, kind, one, optional, **more))
    return found


def accepted(argument: Argument, value: Any) -> bool:
    """Values that are right for this argument after all."""
    if argument.function == "factorize" and argument.name == "rank":
        return False
    if argument.kind == "name" and argument.name == "retraction" and callable(value):
        return argument.function != "Stiefel"
    if argument.name == "schedule" and isinstance(value, int) and value == 3:
        return True
    if argument.function in ("spectra", "accuracy_curves") and isinstance(value, dict):
        return True  # mappings; what they hold has tests of its own
    if argument.name == "eps" and argument.function == "verified_accuracy":
        several = isinstance(value, (tuple, dict, torch.Tensor, np.ndarray))
        return several and len(value) > 0
    if argument.kind == "function" and callable(value):
        return True
    if argument.name == "name":  # of a retraction to be registered
        return False
    if argument.function == "retractions.get":
        return callable(value)
    if argument.name == "strengths":  # an iterable of numbers
        return isinstance(value, (dict, np.ndarray, torch.Tensor)) or value == (1.0,)
    return argument.function == "LowRankConv1d" and isinstance(value, tuple) and value == (1,)


def attempt(argument: Argument, value: Any) -> Finding | None:
    """Call with a hostile value."""
    if accepted(argument, value):
        return None
    shown = repr(value)[:40].replace("\n", " ")
    place = (argument.function, argument.name, shown)
    try:
        with quiet():
            argument.call(value)
    except (TypeError, ValueError) as error:
        words = str(error)
        named = argument.name in words and "unexpected keyword" not in words
        return (
            None if named else Finding("unnamed", *place, f"{type(error).__name__}: {words}"[:90])
        )
    except Exception as error:
        return Finding("internal", *place, f"{type(error).__name__}: {error}"[:90])
    return Finding("silent", *place, "accepted")


def attempt_good(argument: Argument, value: Any) -> Finding | None:
    """Call with a scalar of numpy."""
    shown = f"numpy.{type(value).__name__}({value})"
    try:
        with quiet():
            argument.call(value)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"[:90]
        return Finding("refused", argument.function, argument.name, shown, told)
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def calls(skip: tuple[str, ...] = ()) -> list[tuple[Argument, Any, bool]]:
    """(argument, value, whether it is a good one) of all calls."""
    found = []
    for argument in arguments():
        if argument.function in skip:
            continue
        found += [(argument, value, False) for value in argument.values()]
        if argument.kind in GOOD and argument.name not in ("clip", "strengths", "betas", "iters"):
            found += [(argument, value, True) for value in GOOD[argument.kind]]
    return found


def run(chosen: list[tuple[Argument, Any, bool]]) -> list[Finding]:
    """The findings of some calls."""
    torch.manual_seed(0)
    tried = [(attempt_good if good else attempt)(a, value) for a, value, good in chosen]
    return [finding for finding in tried if finding is not None]


if __name__ == "__main__":
    every = calls()
    findings = run(every)
    if "--short" not in sys.argv:
        print(*findings, sep="\n")
    by_function = collections.Counter((f.function, f.kind) for f in findings)
    for (function, kind), count in sorted(by_function.items()):
        print(f"{function}: {count} {kind}")
    totals = collections.Counter(f.kind for f in findings)
    print(f"{len(every)} calls: {dict(totals) or 'no finding'}")
