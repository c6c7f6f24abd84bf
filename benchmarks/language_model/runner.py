"""Runs, one JSON line each; what has a line is not run again."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import character_model as data
from .._record import FOLDER, conditions, record
from .methods import METHODS

LINES = FOLDER / "language_model.jsonl"
WIDTH, STEPS, WARMUP, SEEDS = 128, 500, 30, (0, 1, 2)
# Halves and quarters first; at 3/8 two factors are half of the weights.
RATIOS = (0.5, 0.25, 0.375, 0.125)
# A training loss this many robust standard deviations above the 50 before it is a spike.
SPIKE = 5.0
WIDEST = 16.0

Key = tuple[str, float, float, int, int]
"""Method, rank over width, rate, seed, steps."""


def spikes(losses: list[float], before: int = 50) -> int:
    """Steps whose training loss is more than 5 · 1.48 MAD above the median of the 50 before."""
    count = 0
    for t in range(before, len(losses)):
        last = losses[t - before : t]
        middle = statistics.median(last)
        spread = 1.4826 * statistics.median(abs(x - middle) for x in last)
        count += not losses[t] <= middle + SPIKE * spread
    return count


def step(model: Any, optimizers: list[Any], batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """One step of training: its loss and its processor time in seconds."""
    x, y = batch
    start = time.process_time()
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    seconds = time.process_time() - start
    return float(loss.detach()), seconds


def train(
    method: str,
    ratio: float,
    lr: float,
    seed: int,
    steps: int,
    width: int = WIDTH,
    until: float = math.inf,
) -> dict[str, Any] | None:
    """One run: warm-up, cosine to zero; losses on the validation and the test part at its end.

    None if it was not at its end by the time `until`, in seconds as of ``time.time``.
    """
    training, validation, test, size = data.load_three()
    model, optimizers = METHODS[method].build(size, ratio, lr, seed, width)
    starts = [[group["lr"] for group in o.param_groups] for o in optimizers]
    generator = torch.Generator().manual_seed(seed)
    losses, times = [], []
    for t in range(steps):
        factor = min(1.0, (t + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * t / steps))
        for optimizer, rates in zip(optimizers, starts, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss, seconds = step(model, optimizers, data.batch(training, generator))
        losses.append(loss)
        times.append(seconds)
        if not math.isfinite(losses[-1]):
            break
        if time.time() > until:
            return None
    lowrank = [p for p in model.blocks.parameters() if hasattr(p, "manifold")]
    conds = [float(p.manifold.cond(p.detach()).max()) for p in lowrank]
    dense = 12 * model.token.weight.shape[1] ** 2 * len(model.blocks)
    had = conditions()
    return {
        "method": method,
        "ratio": ratio,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "width": width,
        "validation": data.mean_loss(model, validation),
        "test": data.mean_loss(model, test),
        "spikes": spikes(losses),
        "largest_jump": max((b - a for a, b in itertools.pairwise(losses)), default=0.0),
        "weights": sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2) / dense,
        "cond": max(conds, default=None),
        "step_ms": 1e3 * statistics.median(times),
        "processor": had["processor"],
        "torch": had["versions"]["torch"],
    }


def measure_times(runs: Runs, rounds: int = 7, steps: int = 12) -> None:
    """Write the processor times of steps, all methods by turns, as a machine's speed changes."""
    training, _, _, size = data.load_three()
    cases: dict[tuple[str, float], list[float]] = {
        (m, ratio): [] for m in METHODS for ratio in runs.ratios(m)
    }
    for _ in range(rounds):
        for (method, ratio), times in cases.items():
            lr = runs.guess(method, ratio)
            model, optimizers = METHODS[method].build(size, ratio, lr, 0, runs.width)
            generator = torch.Generator().manual_seed(0)
            spent = [step(model, optimizers, data.batch(training, generator)) for _ in range(steps)]
            times.append(statistics.median(seconds for _, seconds in spent))
    rows = [
        {"method": method, "ratio": ratio, "step_ms": 1e3 * statistics.median(times)}
        for (method, ratio), times in cases.items()
    ]
    record(runs.path.stem + "_times", rows)


def search(found: dict[float, float], guess: float) -> list[float]:
    """Rates to run next, from the losses found: three around the guess, then beyond the end."""
    if first := [lr for lr in (guess, 2 * guess, guess / 2) if lr not in found]:
        return first
    lr = min(found, key=lambda rate: found[rate])
    if lr == max(found):
        return [2 * lr]
    return [lr / 2] if lr == min(found) else []


def widening(found: dict[float, float]) -> list[float]:
    """Rates to run next until both ends are more than 2 % worse than the best.

    Not beyond a factor of WIDEST, as a rule may gain less than 2 % over weights that stand still.
    """
    best = min(found, key=lambda rate: found[rate])
    rates = []
    for factor in (2.0, 0.5):
        lr = best * factor
        while lr in found and found[lr] <= 1.02 * found[best]:
            lr *= factor
        if lr not in found and 1 / WIDEST <= lr / best <= WIDEST:
            rates.append(lr)
    return rates


class Lines:
    """Rows in a file, a JSON line each; a row is appended whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line]

    def append(self, row: dict[str, Any]) -> None:
        """Add a row at the end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows.append(row)


def by_rate(rows: Iterable[dict[str, Any]]) -> dict[float, float]:
    """Validation losses by rate; infinite where a run diverged."""
    values = {row["lr"]: row["validation"] for row in rows}
    return {lr: x if math.isfinite(x) else math.inf for lr, x in values.items()}


class Runs(Lines):
    """The lines of a file, by what was run.

    Parameters
    ----------
    path : Path
    width, steps : int
        Of all runs of the file; shorter runs are those at equal time.
    guesses : Runs, optional
        Whose best rates are where the searches begin, and whose times are scaled for estimates.
    """

    def __init__(
        self,
        path: Path = LINES,
        width: int = WIDTH,
        steps: int = STEPS,
        guesses: Runs | None = None,
    ) -> None:
        super().__init__(path)
        self.width, self.steps, self.guesses = width, steps, guesses
        times = path.with_name(path.stem + "_times.json")
        self.times: list[dict[str, Any]] = []
        if times.exists():
            self.times = json.loads(times.read_text(encoding="utf-8"))["results"]

    def ratios(self, method: str) -> tuple[float, ...]:
        """The ranks over the width at which a method is run.

        All in the file of the usual width and length; else, and for another τ, the first two, and
        those that have lines already.
        """
        if METHODS[method].weights == "dense":
            return (1.0,)
        main = (self.width, self.steps) == (WIDTH, STEPS) and not is_other(method)
        wanted = RATIOS if main else RATIOS[:2]
        have = {row["ratio"] for row in self.rows if row["method"] == method}
        return tuple(ratio for ratio in RATIOS if ratio in wanted or ratio in have)

    def case(self, method: str, ratio: float) -> list[dict[str, Any]]:
        """The rows of one method and ratio."""
        return [r for r in self.rows if (r["method"], r["ratio"]) == (method, ratio)]

    def find(self, key: Key) -> dict[str, Any] | None:
        """The row of a run, if it is there."""
        names = ("method", "ratio", "lr", "seed", "steps")
        return next((row for row in self.rows if key == tuple(row[k] for k in names)), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row to the file, and say so."""
        self.append(row)
        print(
            f"{row['method']:22}{row['ratio']:6g}{row['lr']:9.4g}{row['seed']:3}{row['steps']:5}"
            f"{row['validation']:9.4f}{row['test']:9.4f}{row['spikes']:4}{row['step_ms']:7.1f} ms",
            flush=True,
        )

    def get(self, method: str, ratio: float, lr: float, seed: int, steps: int) -> dict[str, Any]:
        """The row of this run, which is made if it is not there."""
        key = (method, ratio, lr, seed, steps)
        row: Any = self.find(key)
        if row is None:
            row = train(*key, self.width)
            self.add(row)
        return row

    def losses(self, method: str, ratio: float) -> dict[float, float]:
        """Validation losses of seed 0 at full length, by rate; infinite where a run diverged."""
        return by_rate(
            row
            for row in self.case(method, ratio)
            if row["seed"] == 0 and row["steps"] == self.steps
        )

    def guess(self, method: str, ratio: float) -> float:
        """Where the search begins."""
        if self.guesses is not None and (found := self.guesses.losses(method, ratio)):
            return min(found, key=lambda rate: found[rate])
        return METHODS[method].guess

    def best(self, method: str, ratio: float) -> float:
        """The best rate of seed 0 on a grid of factor 2, extended until it is not at an end."""
        while todo := search(self.losses(method, ratio), self.guess(method, ratio)):
            self.get(method, ratio, todo[0], 0, self.steps)
        found = self.losses(method, ratio)
        return min(found, key=lambda rate: found[rate])

    def step_ms(self, method: str, ratio: float) -> float | None:
        """Processor time of a step: by turns with the other methods if so measured; or None."""
        for row in self.times:
            if (row["method"], row["ratio"]) == (method, ratio):
                return row["step_ms"]
        rows = [row for row in self.case(method, ratio) if row["steps"] == self.steps]
        return statistics.median(row["step_ms"] for row in rows) if rows else None

    def seconds(self, key: Key) -> float:
        """An estimate of the time of a run; 0 if nothing is known."""
        ms = self.step_ms(*key[:2])
        if ms is None and self.guesses is not None:
            ms = (self.guesses.step_ms(*key[:2]) or 0.0) * (self.width / self.guesses.width) ** 2
        return 1e-3 * key[4] * (ms or 0.0)


def is_other(method: str) -> bool:
    """Whether it is CondLRMuon with another τ, which comes last."""
    return "CondLRMuon" in method and "τ = 0.1" not in method


def equal_time_steps(runs: Runs, method: str, ratio: float) -> int:
    """Steps in the processor time that dense AdamW takes for all of its steps."""
    its, ours = runs.step_ms("dense AdamW", 1.0), runs.step_ms(method, ratio)
    assert its is not None
    assert ours is not None
    return round(runs.steps * its / ours / 10) * 10
