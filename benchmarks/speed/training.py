"""Whole training steps, forward + backward + step, of networks against dense and other peers.

All peers of a network run in the same rounds on the same batch. On images every peer first tries
both memory formats and keeps its better one. Ratios are taken round by round.

    python -m benchmarks.speed.training [--device cuda] [--threads 1] [--quick] [--only VGG16]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import _peers
from ._plot import Panel
from ._problems import FORMATS, Problem, loss, problems, quick_problems
from ._run import Report, Settings, main
from ._timing import Task, interleave

PASSES, STEP = "forward + backward", "step"


def to_format(x: Any, format: str) -> Any:
    """A model or a batch of images in that memory format; other batches as they are."""
    if isinstance(x, Tensor):
        # .contiguous() leaves a batch of one channel as it is: it counts as both.
        return x.to(memory_format=FORMATS[format]) if x.ndim == 4 else x
    return x.to(memory_format=FORMATS[format])


def task(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Task:
    """A training step in its two phases."""

    def passes() -> None:
        optimizer.zero_grad()
        loss(model, x, y).backward()

    return Task({PASSES: passes, STEP: optimizer.step})


def tasks_of(
    problem: Problem, settings: Settings
) -> tuple[dict[str, Task], dict[str, str], dict[str, str]]:
    """Each peer's task in its better memory format, these formats, and who was left out."""
    dense = problem.build().to(settings.device)
    start = _peers.Start.of(dense, problem.rank, exclude=problem.exclude)
    x, y = (t.to(settings.device) for t in problem.batch())
    tried: dict[str, dict[str, Task]] = {}
    for format in problem.formats:
        built, missing = _peers.build_all(start, without=settings.without)
        images = to_format(x, format)
        for name, (model, optimizer) in built.items():
            converted = to_format(model, format) if problem.images else model
            tried.setdefault(name, {})[format] = task(converted, optimizer, images, y)
    if len(problem.formats) == 1:
        only = problem.formats[0]
        return {k: t[only] for k, t in tried.items()}, dict.fromkeys(tried, only), missing
    flat = {f"{k}, {f}": t for k, both in tried.items() for f, t in both.items()}
    samples = interleave(flat, device=settings.device, rounds=5, warmup=1, budget=settings.budget)
    medians = {key: samples.time(key).median for key in flat}
    best = {k: min((medians[f"{k}, {f}"], f) for f in both)[1] for k, both in tried.items()}
    return {k: tried[k][f] for k, f in best.items()}, best, missing


def compare(case: str, problem: Problem, settings: Settings) -> list[dict[str, Any]]:
    """Rows of all peers on one network."""
    tasks, formats, missing = tasks_of(problem, settings)
    samples = interleave(
        tasks, device=settings.device, rounds=settings.rounds, budget=4 * settings.budget
    )
    rows = []
    for name in tasks:
        whole = samples.time(name)
        rows.append(
            {
                "case": case,
                "name": name,
                "ms": whole.median * 1e3,
                "seconds": whole,
                "passes_seconds": samples.time(name, PASSES),
                "step_seconds": samples.time(name, STEP),
                "to_dense": samples.ratio(name, "dense SGD"),
                "to_ours": samples.ratio(name, "CondLR"),
                "step_to_ours": samples.ratio(name, "CondLR", STEP),
                "step_share": samples.share(name, STEP, PASSES),
                "note": formats[name] if problem.images else None,
            }
        )
    return rows + [{"case": case, "name": k, "note": why} for k, why in missing.items()]


def measure(settings: Settings) -> Report:
    """Forward + backward + step of networks, ratios to dense SGD and to CondLR."""
    rows: list[dict[str, Any]] = []
    cases = quick_problems() if settings.quick else problems(settings.device)
    for case, problem in settings.chosen(cases).items():
        rows += compare(case, problem, settings)
    columns = {
        "case": "network",
        "name": "by",
        "ms": "ms",
        "to_dense": "/ dense",
        "to_ours": "/ CondLR",
        "step_to_ours": "step / CondLR's",
        "step_share": "step / fwd+bwd",
        "note": "note",
    }
    lines: dict[str, list[tuple[float, float]]] = {}
    dense = {r["case"]: r["ms"] for r in rows if r["name"] == "dense SGD"}
    for row in rows:
        if "ms" in row:
            lines.setdefault(row["name"], []).append((dense[row["case"]], row["ms"]))
    points = {k: sorted(v) for k, v in lines.items()}
    picture = Panel("whole training step", "dense SGD, ms", "ms", points)
    return Report(columns, rows, [picture])


if __name__ == "__main__":
    main("training", measure)
