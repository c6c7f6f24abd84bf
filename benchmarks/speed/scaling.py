"""How the step grows with m, r and the number of layers, and a layer's passes with the batch.

Each exponent is the slope of a line fitted to the logarithms of the last points of a series: 1 in
m, in the layers and in the batch, 2 in r (3 for the r x r work) is what the thin products promise.

    python -m benchmarks.speed.scaling [--device cuda] [--threads 1] [--quick] [--output DIR]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import _peers
from ._plot import Panel
from ._run import Report, Settings, main
from ._timing import Shape, Task, interleave
from .layer import low_rank, passes
from .step import start_of, task

STEPS: dict[str, tuple[int, ...]] = {
    "m = n, r = 32": (256, 512, 1024, 2048, 4096),
    "r, m = n = 1024": (8, 16, 32, 64, 128, 256),
    "layers of 64x64, r = 8": (1, 4, 16, 64, 256),
    "layers of 512x512, r = 64": (1, 2, 4, 8, 16),
}
BATCH, BATCHES = "batch, 1024x1024", (16, 64, 256, 1024, 4096)
NAMES = ("CondLR", "geoopt, Euclidean Stiefel", "dense SGD")


def shapes(series: str, x: int) -> list[Shape]:
    """The weights of one point of a series."""
    if series.startswith("m ="):
        return [(x, x, 32)]
    if series.startswith("r,"):
        return [(1024, 1024, x)]
    return [(64, 64, 8)] * x if "64x64" in series else [(512, 512, 64)] * x


def exponent(points: Sequence[tuple[float, float]], last: int = 3) -> float:
    """Slope of the least-squares line through the logarithms of the last points."""
    logs = [(math.log(x), math.log(y)) for x, y in points[-last:]]
    mean_x, mean_y = (sum(v) / len(logs) for v in zip(*logs, strict=True))
    across = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / across


def step_tasks(series: str, sizes: Sequence[int], device: torch.device) -> dict[str, Task]:
    """One step of each optimizer at each point of the series."""
    tasks = {}
    for x in sizes:
        start = start_of(shapes(series, x), device)
        for name in NAMES:
            model, optimizer = _peers.PEERS[name](start)
            tasks[f"{name}|{x}"] = task(model, optimizer.step)
    return tasks


def batch_tasks(sizes: Sequence[int], device: torch.device) -> dict[str, Task]:
    """Forward and backward passes of a layer 1024 x 1024, dense and at rank 128."""
    tasks = {}
    for x in sizes:
        dense = nn.Linear(1024, 1024)
        for name, layer in (("rank 128", low_rank(dense, 0.125)), ("dense", dense)):
            run = passes(layer, (x, 1024), "contiguous", device)
            tasks[f"{name}|{x}"] = Task({"all": run})
    return tasks


def measure(settings: Settings) -> Report:
    """Fitted exponents of the time in m, r, number of layers, and batch."""
    rows: list[dict[str, Any]] = []
    panels: list[Panel] = []
    series = {k: v[: 2 if settings.quick else None] for k, v in STEPS.items()}
    batches = BATCHES[: 2 if settings.quick else None]
    if settings.quick:
        series.pop("layers of 512x512, r = 64")
    for name, sizes in settings.chosen({**series, BATCH: batches}).items():
        steps = name in series
        tasks = (
            step_tasks(name, sizes, settings.device)
            if steps
            else batch_tasks(sizes, settings.device)
        )
        samples = interleave(
            tasks, device=settings.device, rounds=settings.rounds, budget=settings.budget
        )
        lines: dict[str, list[tuple[float, float]]] = {}
        for key in tasks:
            label, x = key.split("|")
            lines.setdefault(label, []).append((float(x), samples.time(key).median * 1e3))
        for label, points in lines.items():
            row = {"series": name, "name": label, "exponent": exponent(points), "points": points}
            rows.append(row | {"first": points[0][1], "last": points[-1][1]})
        what = "step" if steps else "forward + backward"
        panels.append(Panel(f"{what} over {name}", name.split(",")[0], "ms", lines))
    columns = {
        "series": "over",
        "name": "of",
        "first": "ms at the first",
        "last": "ms at the last",
        "exponent": "exponent",
    }
    return Report(columns, rows, panels)


if __name__ == "__main__":
    main("scaling", measure)
