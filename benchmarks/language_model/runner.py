"""Runs, one JSON line each; what has a line is not run again."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .. import character_model as data
from .._record import FOLDER
from .methods import METHODS

LINES = FOLDER / "language_model.jsonl"
STEPS, WARMUP, SEEDS = 500, 30, (0, 1, 2)
RATIOS = (0.5, 0.25)
# A training loss this many robust standard deviations above the 50 before it is a spike.
SPIKE = 5.0


def spikes(losses: list[float], before: int = 50) -> int:
    """Steps whose training loss is more than 5 · 1.48 MAD above the median of the 50 before."""
    count = 0
    for t in range(before, len(losses)):
        last = losses[t - before : t]
        middle = statistics.median(last)
        spread = 1.4826 * statistics.median(abs(x - middle) for x in last)
        count += not losses[t] <= middle + SPIKE * spread
    return count


def train(method: str, ratio: float, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """One run: warm-up, cosine to zero; losses on the validation and the test part at its end."""
    training, validation, test, size = data.load_three()
    model, optimizers = METHODS[method].build(size, ratio, lr, seed)
    starts = [[group["lr"] for group in o.param_groups] for o in optimizers]
    generator = torch.Generator().manual_seed(seed)
    losses, times = [], []
    for t in range(steps):
        factor = min(1.0, (t + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * t / steps))
        for optimizer, rates in zip(optimizers, starts, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        x, y = data.batch(training, generator)
        start = time.process_time()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        times.append(time.process_time() - start)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
    lowrank = [p for p in model.blocks.parameters() if hasattr(p, "manifold")]
    conds = [float(p.manifold.cond(p.detach()).max()) for p in lowrank]
    dense = 12 * model.token.weight.shape[1] ** 2 * len(model.blocks)
    return {
        "method": method,
        "ratio": ratio,
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "validation": data.mean_loss(model, validation),
        "test": data.mean_loss(model, test),
        "spikes": spikes(losses),
        "largest_jump": max(b - a for a, b in itertools.pairwise(losses)),
        "weights": sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2) / dense,
        "cond": max(conds, default=None),
        "step_ms": 1e3 * statistics.median(times),
    }


class Runs:
    """The lines of a file, by what was run."""

    def __init__(self, path: Path = LINES) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line]

    def get(self, method: str, ratio: float, lr: float, seed: int, steps: int) -> dict[str, Any]:
        """The row of this run, which is made if it is not there."""
        key = (method, ratio, lr, seed, steps)
        for row in self.rows:
            if key == tuple(row[k] for k in ("method", "ratio", "lr", "seed", "steps")):
                return row
        row = train(*key)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows.append(row)
        print(
            f"{method:22}{ratio:6g}{lr:9.4g}{seed:3}{steps:5}{row['validation']:9.4f}"
            f"{row['test']:9.4f}{row['spikes']:4}{row['step_ms']:7.1f} ms",
            flush=True,
        )
        return row

    def loss(self, method: str, ratio: float, lr: float, seed: int = 0) -> float:
        """Validation loss at full length; infinite if the run diverged."""
        value = self.get(method, ratio, lr, seed, STEPS)["validation"]
        return value if math.isfinite(value) else math.inf

    def best(self, method: str, ratio: float) -> float:
        """The best rate of seed 0 on a grid of factor 2, extended until it is not at an end."""
        guess = METHODS[method].guess
        found = {lr: self.loss(method, ratio, lr) for lr in (guess, 2 * guess, guess / 2)}
        while True:
            lr = min(found, key=lambda rate: found[rate])
            if lr == max(found):
                found[2 * lr] = self.loss(method, ratio, 2 * lr)
            elif lr == min(found):
                found[lr / 2] = self.loss(method, ratio, lr / 2)
            else:
                return lr

    def widen(self, method: str, ratio: float) -> None:
        """Extend the grid at both ends until a rate is more than 2 % worse than the best."""
        best = self.best(method, ratio)
        limit = 1.02 * self.loss(method, ratio, best)
        for factor in (2.0, 0.5):
            lr = best * factor
            while self.loss(method, ratio, lr) <= limit:
                lr *= factor


def ratios(method: str) -> tuple[float, ...]:
    """The ranks over the width at which a method is run."""
    return (1.0,) if METHODS[method].weights == "dense" else RATIOS


def groups() -> Iterator[list[tuple[str, float]]]:
    """Methods and ratios in the order of work: first all but the other τ of CondLRMuon."""
    first = [name for name in METHODS if "τ = 0.1" in name or "CondLRMuon" not in name]
    for names in (first, [name for name in METHODS if name not in first]):
        yield [(m, ratio) for ratio in (1.0, *RATIOS) for m in names if ratio in ratios(m)]


def equal_time_steps(runs: Runs, method: str, ratio: float) -> int:
    """Steps in the processor time that dense AdamW takes for all of its steps."""

    def step_ms(method: str, ratio: float) -> float:
        rows = [r for r in runs.rows if (r["method"], r["ratio"]) == (method, ratio)]
        return statistics.median(r["step_ms"] for r in rows if r["steps"] == STEPS)

    return round(STEPS * step_ms("dense AdamW", 1.0) / step_ms(method, ratio) / 10) * 10


def everything(runs: Runs) -> None:
    """All runs, those that matter most first."""
    for cases in groups():
        for method, ratio in cases:
            runs.best(method, ratio)
        for method, ratio in cases:
            steps = equal_time_steps(runs, method, ratio)
            runs.get(method, ratio, runs.best(method, ratio), 0, steps)
        for seed in SEEDS[1:]:
            for method, ratio in cases:
                runs.loss(method, ratio, runs.best(method, ratio), seed)
    for cases in groups():
        for method, ratio in cases:
            runs.widen(method, ratio)
