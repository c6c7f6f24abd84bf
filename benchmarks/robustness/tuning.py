"""The learning rate of each method, from a validation split, with the same budget for all."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from lrmanifold.experiments.data import Dataset, validation_split
from lrmanifold.robustness import accuracy_under_attack, fgsm

from .experiment import Run, digest
from .table import Table
from .training import train

Log = Callable[[str], None]


def subset(data: Dataset, samples: int | None) -> Dataset:
    """The first `samples` training images after a fixed shuffle (files may be sorted by class)."""
    if samples is None or samples >= len(data.train_y):
        return data
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(0))[:samples]
    return dataclasses.replace(data, train_x=data.train_x[order], train_y=data.train_y[order])


def tuned_rate(
    run: Run, data: Dataset, trials: Table, *, device: str = "cpu", amp: bool = False, log: Log
) -> tuple[float, dict[str, Any]]:
    """The best rate of the grid for the run's method, and what was spent to find it.

    Each trial is a line of `trials` as soon as it is done; nothing is tried twice. The seed of the
    trials is the tuning's own, so all seeds of a method share one rate.
    """
    if run.method.lr is not None:
        return run.method.lr, {"tuned": False, "rate": run.method.lr}
    tuning = run.tuning
    rates = tuning.rates(run.method)
    short = dataclasses.replace(run.training, epochs=tuning.epochs)
    split: Dataset | None = None
    scores: dict[float, float] = {}
    done = {row["key"]: row for row in trials.rows()}
    for lr in rates:
        method = dataclasses.replace(run.method, lr=lr)
        trial = dataclasses.replace(run, training=short, method=method, seed=tuning.seed)
        key = digest([trial.settings(), dataclasses.asdict(tuning)])
        if key not in done:
            if split is None:
                split = validation_split(data, tuning.validation, tuning.seed)
                split = subset(split, tuning.samples)
            done[key] = _trial(trial, split, lr, device, amp) | {"key": key}
            trials.append(done[key])
            log(f"tuning {run.method.name}: rate {lr:g} scores {100 * done[key]['score']:.2f} %")
        scores[lr] = done[key]["score"]
    kept = round((1 - tuning.validation) * len(data.train_y))
    best = max(rates, key=lambda lr: scores[lr])
    budget = {
        "tuned": True,
        "rate": best,
        "scores": {f"{lr:g}": round(s, 5) for lr, s in scores.items()},
        "at_edge": best in (rates[0], rates[-1]),
        "runs": len(rates),
        "epochs": tuning.epochs,
        "images": min(tuning.samples or kept, kept),
        "criterion": f"mean of clean and FGSM {tuning.strength:g} accuracy, validation split",
    }
    return best, budget


def _trial(trial: Run, split: Dataset, lr: float, device: str, amp: bool) -> dict[str, Any]:
    begin = time.perf_counter()
    strength = trial.tuning.strength
    try:
        model = train(trial, split, lr, None, device=device, amp=amp).trainee.model
        pair = (split.test_x, split.test_y)
        found = accuracy_under_attack(model, pair, fgsm, (0.0, strength), batch_size=512)
        clean, robust = found[0.0], found[strength]
    except FloatingPointError:  # a rate too high is a result, and counts as one of the budget
        clean = robust = 0.0
    return {
        "data": trial.training.data,
        "method": trial.method.name,
        "settings": trial.settings(),
        "lr": lr,
        "clean": clean,
        "fgsm": robust,
        "score": 0.5 * (clean + robust),
        "seconds": round(time.perf_counter() - begin, 2),
    }
