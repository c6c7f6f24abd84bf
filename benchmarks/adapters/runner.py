"""Pre-training once, then adapters: one JSON line a run; what has a line is not run again."""

from __future__ import annotations

import copy
import functools
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import character_model as data
from .._record import FOLDER, conditions
from ..language_model.runner import Lines, by_rate, search, step
from .methods import FULL, METHODS

LINES = FOLDER / "adapters.jsonl"
TEXT = data.TEXT.with_name("argparse_source.txt")
WIDTH, PRETRAINING, STEPS, WARMUP, SEEDS = 128, 1500, 300, 20, (0, 1, 2, 3, 4)
RANKS = (4, 16)


@functools.cache
def texts() -> tuple[Any, Any]:
    """The parts of the text of pre-training and of the new one, in one alphabet."""
    both = [path.read_text(encoding="utf-8") for path in (data.TEXT, TEXT)]
    first, second = (data.load_three(text, alphabet="".join(both)) for text in both)
    return first, second


def fit(model: nn.Module, optimizers: list[Any], part: Tensor, steps: int, seed: int) -> float:
    """Train with warm-up and cosine to zero; the median processor time of a step in seconds."""
    starts = [[group["lr"] for group in o.param_groups] for o in optimizers]
    generator = torch.Generator().manual_seed(seed)
    times = []
    for t in range(steps):
        factor = min(1.0, (t + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * t / steps))
        for optimizer, rates in zip(optimizers, starts, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        loss, seconds = step(model, optimizers, data.batch(part, generator))
        times.append(seconds)
        if not math.isfinite(loss):
            break
    return statistics.median(times)


@functools.cache
def pretrained() -> data.Transformer:
    """The model after pre-training by Muon on the first text, the same each time."""
    (training, _, _, size), _ = texts()
    torch.manual_seed(0)
    model = data.Transformer(size, WIDTH)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(matrices, 0.02, weight_decay=0.0)
    fit(model, [muon, torch.optim.AdamW(others, 2e-3, weight_decay=0.0)], training, PRETRAINING, 0)
    return model


def stable_rank(model: nn.Module, base: nn.Module) -> float:
    """Mean over the layers of ‖ΔW‖²_F/‖ΔW‖²₂, of the maps that they compute."""
    found = []
    for new, old in zip(_linear(model), _linear(base), strict=True):
        basis = torch.cat([torch.eye(old.in_features), torch.zeros(1, old.in_features)])
        difference = new(basis) - old(basis)
        s = torch.linalg.svdvals(difference[:-1] - difference[-1])
        found.append(float(s.square().sum() / s[0].square().clamp_min(1e-30)))
    return statistics.fmean(found)


def _linear(model: Any) -> list[Any]:
    return [x for b in model.blocks for x in (b.query_key_value, b.out, b.up, b.down)]


def train(method: str, rank: int, lr: float, seed: int) -> dict[str, Any]:
    """One run; losses on the validation and the test part of the new text at its end."""
    _, (training, validation, test, _) = texts()
    base = pretrained()
    model, how = copy.deepcopy(base), METHODS[method]
    torch.manual_seed(seed)
    moved = how.put(model, rank)
    seconds = fit(model, [how.rule(moved, lr)], training, STEPS, seed)
    with torch.no_grad():
        rank_of_change = stable_rank(model, base)
    had = conditions()
    return {
        "method": method,
        "rank": rank,
        "lr": lr,
        "seed": seed,
        "before": data.mean_loss(base, test),
        "validation": data.mean_loss(model, validation),
        "test": data.mean_loss(model, test),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "stable_rank": rank_of_change,
        "step_ms": 1e3 * seconds,
        "processor": had["processor"],
        "torch": had["versions"]["torch"],
    }


class Runs(Lines):
    """The lines of a file, by what was run."""

    def __init__(self, path: Path = LINES) -> None:
        super().__init__(path)

    def get(self, method: str, rank: int, lr: float, seed: int) -> dict[str, Any]:
        """The row of this run, which is made if it is not there."""
        key = (method, rank, lr, seed)
        for row in self.rows:
            if key == tuple(row[k] for k in ("method", "rank", "lr", "seed")):
                return row
        row = train(*key)
        self.append(row)
        print(
            f"{method:26}{rank:3}{lr:9.4g}{seed:3}{row['validation']:9.4f}{row['test']:9.4f}"
            f"{row['stable_rank']:6.1f}{row['step_ms']:7.1f} ms",
            flush=True,
        )
        return row

    def losses(self, method: str, rank: int) -> dict[float, float]:
        """Validation losses of seed 0, by rate; infinite where a run diverged."""
        key = (method, rank, 0)
        return by_rate(row for row in self.rows if (row["method"], row["rank"], row["seed"]) == key)

    def best(self, method: str, rank: int) -> float:
        """The best rate of seed 0 on a grid of factor 2, extended until it is not at an end."""
        while todo := search(self.losses(method, rank), METHODS[method].guess):
            self.get(method, rank, todo[0], 0)
        found = self.losses(method, rank)
        return min(found, key=lambda rate: found[rate])


def ranks(method: str) -> tuple[int, ...]:
    """The ranks of a method; 0 where all weights are trained."""
    return (0,) if method == FULL else RANKS


def everything(runs: Runs) -> None:
    """All runs, rank after rank, in each the searches first."""
    for rank in (0, *RANKS):
        names = [method for method in METHODS if rank in ranks(method)]
        for method in names:
            runs.best(method, rank)
        for seed in SEEDS[1:]:
            for method in names:
                runs.get(method, rank, runs.best(method, rank), seed)
