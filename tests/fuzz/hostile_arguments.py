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
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold import testing
from lrmanifold.experiments.training import Settings
from lrmanifold.nn import LowRankAdapter, LowRankConv1d, LowRankConv2d, LowRankLinear


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


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 18), nn.Linear(18, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.flatten(1))))


def packed(manifold: Any) -> Any:
    from lrmanifold.interop.pymanopt import PackedFixedRank

    return PackedFixedRank(manifold)


def scheduled(**options: Any) -> Any:
    model = low()
    good = {"model": model, "optimizer": lrm.optim.CondLR(model.parameters(), lr=0.1)}
    return lrm.optim.RankScheduler(**{**good, **options})


def low() -> nn.Module:
    return lrm.factorize(Net(), rank=2)


def functions() -> dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]]:
    """Name to (function, good arguments, kinds of the arguments to be tried)."""
    x, y = torch.rand(4, 20), torch.zeros(4, dtype=torch.long)
    M = lrm.FixedRank(6, 5, 2)
    W, S = torch.randn(6, 5), torch.eye(3) + 0.1 * torch.ones(3, 3)

    def tau(**more: Any) -> tuple:
        return "number", {"optional": True, "bad": (-1.0,), **more}

    rank = ("integer", {"bad": (0, -1, 99)})
    size = ("integer", {"bad": (0, -1)})
    share = ("number", {"optional": True, "bad": (0.0, -1.0, 2.0)})
    optional_name = ("name", {"optional": True})
    # "rank" of factorize: a float is a share, so that only these are wrong
    ranks = (
        "number",
        {"optional": True, "bad": (0, -1, 0.0, 1.5, {"*": "3"}, {"*": True}, {3: 2})},
    )
    layer = {"rank": rank, "tau": tau(), "gradient": "name", "retraction": optional_name,
             "device": "device", "dtype": ("dtype", {"optional": True})}  # fmt: skip
    sizes = ("integer", {"bad": (0, -1, (1, 2, 3), (1, "x"))})
    attack = {"model": "function", "x": "tensor", "y": "tensor", "eps": ("number", {"bad": (-1,)}),
              "norm": "name", "loss": "function",
              "clip": ("number", {"optional": True, "bad": ((1.0, 0.0), (0, 1, 2), (0, "1"))}),
              }  # fmt: skip
    group = {"lr": ("number", {"bad": (-1.0, torch.tensor(-1.0))}),
             "weight_decay": ("number", {"bad": (-1.0,)}),
             "penalty": ("number", {"bad": (-1.0,)})}  # fmt: skip
    rate = {"lr": 0.1}
    return {
        "factorize": (
            lambda **k: lrm.factorize(**{"model": Net(), **k}), {"rank": 2},
            {"model": "module", "rank": ranks, "tau": tau(),
             "include": ("patterns", {"bad": ("z",)}), "exclude": ("patterns", {"bad": ("z", "")}),
             "init": "name", "gradient": "name",
             "retraction": optional_name, "keep_larger": "flag", "rank_multiple": size,
             "summary": ("function", {"optional": True})},
        ),
        "factorize by share": (lambda **k: lrm.factorize(Net(), **k), {},
                               {"compression": share, "energy": share}),
        "densify": (lrm.densify, {}, {"model": "module"}),
        "fold": (lrm.fold, {}, {"model": "module"}),
        "report": (lrm.report, {}, {"model": "module"}),
        "trained_state_dict": (lrm.nn.trained_state_dict, {}, {"model": "module"}),
        "param_groups": (
            lrm.optim.param_groups, {"model": low()},
            {"model": "module", "lr": ("number", {"optional": True, "bad": (-1.0,)}),
             "weight_decay": ("number", {"optional": True, "bad": (-1.0,)})},
        ),
        "LowRankLinear": (
            LowRankLinear, {"in_features": 6, "out_features": 5, "rank": 2},
            {"in_features": size, "out_features": size, "bias": "flag", **layer},
        ),
        "LowRankConv2d": (
            LowRankConv2d, {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "rank": 2},
            {"in_channels": size, "out_channels": size, "kernel_size": sizes, "stride": sizes,
             "padding": ("integer", {"bad": (-1, (1, 2, 3), "full")}), "dilation": sizes,
             "groups": size, "bias": "flag", "padding_mode": "name", **layer},
        ),
        "LowRankConv1d": (
            LowRankConv1d, {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "rank": 2},
            {"kernel_size": sizes, "stride": sizes},
        ),
        "LowRankLinear.from_dense": (
            LowRankLinear.from_dense, {"module": nn.Linear(6, 5), "rank": 2},
            {"module": "module", "init": "name", "rank": rank, "tau": tau()},
        ),
        "LowRankConv2d.from_dense": (
            LowRankConv2d.from_dense, {"module": nn.Conv2d(4, 4, 3), "rank": 2},
            {"module": "module", "init": "name", "rank": rank, "tau": tau()},
        ),
        "LowRankAdapter": (
            LowRankAdapter, {"dense": nn.Linear(6, 5), "rank": 2},
            {"dense": "module", "rank": rank, "init": "name", "tau": tau(),
             "dtype": ("dtype", {"optional": True})},
        ),
        "FixedRank": (
            lrm.FixedRank, {"m": 6, "n": 5, "rank": 2},
            {"m": size, "n": size, "rank": rank, "retraction": "name", "gradient": "name"},
        ),
        "WellConditioned": (
            lrm.WellConditioned, {"m": 6, "n": 5, "rank": 2, "tau": 0.1},
            {"m": size, "rank": rank, "retraction": "name", "gradient": "name",
             "tau": ("number", {"bad": (-1.0,)}), "centre": "name"},
        ),
        "Stiefel": (lrm.Stiefel, {}, {"retraction": "name"}),
        "FixedRank.from_dense": (M.from_dense, {}, {"W": "tensor"}),
        "FixedRank.from_dense, matrices": (M.from_dense, {}, {"W": "matrix"}),
        "FixedRank.set_rank_": (M.set_rank_, {}, {"rank": rank}),
        "FixedRank.to_dense": (M.to_dense, {}, {"X": "tensor"}),
        "FixedRank.project_ambient": (
            M.project_ambient, {"X": M.random(), "Z": W}, {"X": "tensor", "Z": "tensor"},
        ),
        "retractions.get": (lrm.retractions.get, {}, {"retraction": "name"}),
        "retractions.register": (
            lambda name: lrm.retractions.register(name), {},
            {"name": ("patterns", {})},
        ),
        "monitor": (
            lrm.monitor, {"model": low()},
            {"model": "module", "every": size, "optimizer": "optimizer"},
        ),
        "monitor with a reference": (
            lrm.monitor, {"model": low(), "reference": Net(), "loss": lambda m: m(x).sum(),
                          "optimizer": lrm.optim.CondLR(low().parameters(), **rate)},
            {"reference": "module", "loss": "function"},
        ),
        "fgsm": (lrm.robustness.fgsm, {"model": Net(), "x": x, "y": y, "eps": 0.1}, attack),
        "pgd": (
            lrm.robustness.pgd, {"model": Net(), "x": x, "y": y, "eps": 0.1, "steps": 2},
            {**attack, "steps": size, "restarts": size, "random_start": "flag",
             "step_size": ("number", {"optional": True, "bad": (-1.0,)}),
             "generator": ("optimizer", {})},
        ),
        "accuracy_under_attack": (
            lrm.robustness.accuracy_under_attack,
            {"model": Net(), "data": (x, y), "attack": lrm.robustness.fgsm, "strengths": [0.1]},
            {"model": "function", "attack": "function", "batch_size": size, "device": "device",
             "strengths": ("number", {"bad": ([NAN], [-1.0], ["x"])}), "data": "tensor"},
        ),
        "robustness.condition_number": (
            lrm.robustness.condition_number, {"f": Net(), "x": x},
            {"f": "function", "x": "tensor", "batched": "flag", "iters": size,
             "tol": ("number", {"optional": True, "bad": (-1.0,)})},
        ),
        "check_manifold": (
            testing.check_manifold, {"manifold": M, "trials": 1, "checks": ["retr"]},
            {"manifold": ("module", {"bad": (nn.Linear(2, 2),)}), "dtype": "dtype",
             "device": ("device", {"bad": (None,)}),
             "seed": ("integer", {}), "trials": size, "checks": ("patterns", {"bad": (["zzz"],)}),
             "skip": ("patterns", {"bad": (["zzz"],)}),
             "tol": ("number", {"optional": True, "bad": (-1.0,)})},
        ),
        "check_retraction": (
            testing.check_retraction, {"manifold": M, "order": 2},
            {"manifold": ("module", {"bad": (nn.Linear(2, 2),)}), "order": size, "dtype": "dtype"},
        ),
        "Settings": (
            Settings, {},
            {"epochs": size, "batch_size": size, "seed": ("integer", {"bad": (2**70,)}),
             "lr": ("number", {"bad": (-1.0, 0.0)}), "momentum": ("number", {"bad": (-1, 1, 2)})},
        ),
        "checkpoint.save": (
            lrm.checkpoint.save, {"path": Path(tempfile.gettempdir()) / "fuzz.pt", "model": low()},
            {"path": "path", "model": "module", "optimizer": "optimizer"},
        ),
        "checkpoint.load": (
            lrm.checkpoint.load, {"path": "missing.pt", "model": low()},
            {"path": "path", "model": "module", "optimizer": "optimizer"},
        ),
        "lipschitz": (
            lrm.certify.lipschitz, {"model": low(), "input_shape": (20,)},
            {"model": "module", "norm": "name",
             "input_shape": ("patterns", {"bad": ((0,), (-1,), (2.0,), ("a",), 5, "x")})},
        ),
        "radius": (
            lrm.certify.radius, {"model": low(), "x": x},
            {"model": "module", "x": "tensor", "bound": ("optimizer", {})},
        ),
        "verified_accuracy": (
            lrm.certify.verified_accuracy, {"model": low(), "data": (x, y), "eps": 0.1},
            {"model": "module", "data": "tensor", "batch_size": size,
             "eps": ("number", {"bad": (-1.0,)}),
             "attack": ("function", {"optional": True}),
             "progress": ("function", {"optional": True})},
        ),
        "worst_case_logits": (
            lrm.certify.worst_case_logits,
            {"model_or_bound": low(), "logits": torch.randn(4, 3), "y": y, "eps": 0.1},
            {"model_or_bound": "module", "logits": "tensor", "y": "tensor",
             "eps": ("number", {"bad": (-1.0,)})},
        ),
        "CertifiedLoss": (
            lrm.certify.CertifiedLoss, {"eps": 0.1},
            {"eps": ("number", {"bad": (-1.0,)}), "kind": "name",
             "weight": ("number", {"bad": (-1.0,)}), "temperature": ("number", {"bad": (-1.0,)}),
             "schedule": ("function", {"optional": True, "bad": (0, -1)})},
        ),
        "register_bound": (
            lrm.certify.register_bound, {"module_type": Net, "function": len},
            {"function": "function", "module_type": ("optimizer", {"bad": (None,)})},
        ),
        "MaxMin": (lrm.nn.MaxMin, {}, {"dim": ("integer", {"bad": (0,)})}),
        "Patchify": (lrm.nn.Patchify, {"size": 2}, {"size": size}),
        "Residual": (lambda blocks: lrm.nn.Residual(blocks), {}, {"blocks": "module"}),
        "ConvexPotential": (
            lrm.nn.ConvexPotential, {"features": 6, "rank": 2},
            {"features": size, "rank": rank, "tau": tau(),
             "hidden": ("integer", {"optional": True, "bad": (0, -1)}),
             "activation": ("function", {"optional": True})},
        ),
        "PackedFixedRank": (packed, {}, {"manifold": "module"}),
        "spectra": (
            lrm.viz.spectra, {"history": {"a": np.ones((3, 2))}},
            {"history": "module", "columns": size,
             "tau": ("number", {"optional": True, "bad": (-1.0,)})},
        ),
        "accuracy_curves": (
            lrm.viz.accuracy_curves, {"results": {"a": {0.0: 0.9, 0.1: 0.8}}},
            {"results": "module", "legend": "flag", "relative_to": optional_name},
        ),
        "svdvals": (lrm.linalg.svdvals, {}, {"A": "tensor"}),
        "spectral_clip": (
            lrm.linalg.spectral_clip, {"S": S, "tau": 0.1},
            {"S": "tensor", "tau": ("number", {"bad": (-1.0,)}), "centre": "name"},
        ),
        "CondLR": (
            lambda **k: lrm.optim.CondLR(low().parameters(), **k), {**rate, "momentum": 0.5},
            {**group, "momentum": ("number", {"bad": (-1.0, 1.0)}), "nesterov": "flag",
             "metric": "name", "maximize": "flag", "skip_nonfinite": "flag",
             "clip_margin": ("number", {"bad": (-1.0,)})},
        ),
        "CondLRAdam": (
            lambda **k: lrm.optim.CondLRAdam(low().parameters(), **k), rate,
            {**group, "eps": ("number", {"bad": (-1.0,)}), "maximize": "flag",
             "betas": ("number", {"bad": ((0.9,), (0.9, 1.0), (-1, 0.5), ("a", 0.5))})},
        ),
        "DLRT": (
            lambda **k: lrm.optim.DLRT(low().parameters(), **k), {**rate, "tol": 0.1},
            {**group, "integrator": "name", "s_steps": size, "min_rank": size,
             "tol": ("number", {"optional": True, "bad": (-1.0, 1.0)}),
             "max_rank": ("integer", {"optional": True, "bad": (0, -1)}),
             "penalty_squared": "flag", "maximize": "flag", "skip_nonfinite": "flag"},
        ),
        "RankScheduler": (
            scheduled, {"tol": 0.1},
            {"model": "module", "optimizer": ("optimizer", {"bad": (None,)}), "every": size,
             "tol": ("number", {"bad": (-1.0,)}), "min_rank": size,
             "max_rank": ("integer", {"optional": True, "bad": (0, -1)}),
             "augment": ("integer", {"optional": True, "bad": (0, -1)})},
        ),
        "OptionScheduler": (
            lrm.optim.OptionScheduler,
            {"optimizer": lrm.optim.CondLR(low().parameters(), **rate), "option": "penalty",
             "function": float},
            {"optimizer": ("optimizer", {"bad": (None,)}), "option": "name",
             "function": "function"},
        ),
        "average_points": (
            lrm.optim.average_points,
            {"manifold": M, "X": M.random(), "Y": M.random(), "weight": 0.5},
            {"X": "tensor", "Y": "tensor", "weight": ("number", {"bad": (-1.0, 2.0)}),
             "manifold": "module"},
        ),
        "retracting_average": (
            lrm.optim.retracting_average, {"model": low()},
            {"model": "module", "decay": ("number", {"optional": True, "bad": (-1.0, 1.0)}),
             "use_buffers": "flag"},
        ),
    }  # fmt: skip


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
