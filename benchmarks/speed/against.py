"""Optimizer steps of this code against those of another checkout, in one process, in turn.

The other package is imported under another name, so both run interleaved, step by step, on equal
weights with gradients of their own points. Times are CPU seconds of the process, which other
programs disturb least.

    git worktree add ../old COMMIT
    python -m benchmarks.speed.against ../old [--quick] [--output DIR]
    python -m benchmarks.speed.against ../old --training "VGG16 b32" "VGG16 b128 50%"

With ``--training`` whole training steps of networks, beside dense SGD, which runs twice: the two
differ by what the machine adds.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import geoopt
import torch
from torch import Tensor

import lrmanifold

from .._record import FOLDER, conditions
from ._problems import Problem, loss, problems

_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
RULES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("CondLR", "CondLR", {"lr": 1e-2, "momentum": 0.9}),
    ("CondLR, scalar metric", "CondLR", {"lr": 1e-2, "momentum": 0.9, "metric": "scalar"}),
    ("CondLRAdam", "CondLRAdam", {"lr": 1e-3}),
)


def other_package(checkout: Path) -> Any:
    """The package ``lrmanifold`` of another checkout, as ``lrmanifold_old``."""
    name, folder = "lrmanifold_old", checkout / "lrmanifold"
    if not (folder / "__init__.py").is_file():
        raise SystemExit(f"checkout must hold lrmanifold/__init__.py, got {checkout}")
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def vgg16(share: float) -> list[tuple[int, int, int]]:
    """Sizes m, n, r of VGG16's low-rank weights."""
    pairs = list(zip(_WIDTHS[1:], _WIDTHS, strict=False))
    sizes = [(out, 9 * into, max(1, int(share * min(out, 9 * into)))) for out, into in pairs]
    return [*sizes, (512, 512, int(share * 512))]


CASES: dict[str, list[tuple[int, int, int]]] = {
    "VGG16 20 %": vgg16(0.2),
    "VGG16 50 %": vgg16(0.5),
    "48 of 64 x 64 rank 8": [(64, 64, 8)] * 48,
    "1024 x 4096 rank 64": [(1024, 4096, 64)],
}


def weights(package: Any, sizes: list[tuple[int, int, int]]) -> list[Any]:
    """The same weights on the manifolds of either package."""
    params = []
    for i, (m, n, r) in enumerate(sizes):
        torch.manual_seed(i)
        M = package.WellConditioned(m, n, r, tau=0.1)
        X = M.random(*M.point_shape).as_subclass(Tensor).clone()
        params.append(geoopt.ManifoldParameter(X, manifold=M))
    return params


def pull(p: Any, target: Tensor) -> None:
    """The gradient of ½‖W - T‖² with respect to U, S, V."""
    U, S, V = p.manifold.unpack(p.detach())
    G = (U @ S) @ V.mT - target
    p.grad = torch.cat((G @ V @ S.mT, U.mT @ G @ V, G.mT @ U @ S))


def compare(old: Any, case: str, rule: tuple[str, str, dict[str, Any]], steps: int) -> dict:
    """Median CPU seconds of a step by either package, and their ratio step by step."""
    label, kind, options = rule
    sides = []
    for package in (old, lrmanifold):
        params = weights(package, CASES[case])
        sides.append((params, getattr(package.optim, kind)(params, **options)))
    targets = [torch.randn(m, n) / 50 for m, n, _ in CASES[case]]
    seconds: tuple[list[float], list[float]] = ([], [])
    gc.disable()
    try:
        for _ in range(steps + 3):
            for (params, optimizer), times in zip(sides, seconds, strict=True):
                for p, target in zip(params, targets, strict=True):
                    pull(p, target)
                start = time.process_time()
                optimizer.step()
                times.append(time.process_time() - start)
    finally:
        gc.enable()
    before, after = (times[3:] for times in seconds)  # the first steps load libraries
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    return {
        "case": case,
        "rule": label,
        "old ms": 1e3 * statistics.median(before),
        "new ms": 1e3 * statistics.median(after),
        "new / old": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def whole_steps(old: Any, case: str, problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """Median CPU seconds of training steps in turn; low-rank images in channels-last memory."""
    torch.manual_seed(0)
    dense = problem.build()
    x, y = problem.batch()
    tasks: dict[str, tuple[Any, Any, Tensor]] = {}
    for name in ("dense SGD", "dense SGD again"):
        model: Any = copy.deepcopy(dense)
        tasks[name] = model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), x
    for side, package in (("old", old), ("new", lrmanifold)):
        for kind, options in (("CondLR", {"lr": 1e-3, "momentum": 0.9}), ("CondLRAdam", {})):
            model = copy.deepcopy(dense)
            package.factorize(model, rank=problem.rank, tau=0.1, exclude=[problem.exclude])
            images = x
            if problem.images:
                model = model.to(memory_format=torch.channels_last)
                images = x.to(memory_format=torch.channels_last)
            optimizer = getattr(package.optim, kind)(model.parameters(), **{"lr": 1e-4, **options})
            tasks[f"{kind}, {side}"] = model, optimizer, images
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    gc.disable()
    try:
        for _ in range(rounds + 2):
            for name, (model, optimizer, images) in tasks.items():
                start = time.process_time()
                optimizer.zero_grad()
                loss(model, images, y).backward()
                between = time.process_time()
                optimizer.step()
                seconds[name].append((between - start, time.process_time() - between))
    finally:
        gc.enable()
    times = {name: found[2:] for name, found in seconds.items()}  # the first steps load libraries

    def ratio(name: str, other: str, whole: bool) -> float:
        pairs = zip(times[name], times[other], strict=True)
        return statistics.median((sum(a) / sum(b)) if whole else a[1] / b[1] for a, b in pairs)

    return [
        {
            "case": case,
            "by": name,
            "passes ms": 1e3 * statistics.median(a for a, _ in found),
            "step ms": 1e3 * statistics.median(b for _, b in found),
            "whole / dense": ratio(name, "dense SGD", True),
            "step / CondLR's": ratio(name, f"CondLR, {name[-3:]}", False)
            if name.startswith("CondLR")
            else None,
            "rounds": rounds,
            "load": os.getloadavg()[0],
        }
        for name, found in times.items()
    ]


def main(arguments: list[str]) -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--quick", action="store_true", help="the small cases, few steps")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--training", nargs="+", metavar="TEXT", help="networks, by their name")
    parser.add_argument("--rounds", type=int, default=11, help="of --training")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    old, rows = other_package(chosen.checkout), []
    if chosen.training:
        for case, problem in problems(torch.device("cpu")).items():
            if any(text in case for text in chosen.training):
                found = whole_steps(old, case, problem, chosen.rounds)
                rows += found
                for row in found:
                    numbers = (f"{v:.3f}" if isinstance(v, float) else v for v in row.values())
                    print(*numbers, sep=", ", flush=True)
    else:
        cases = list(CASES)[2:] if chosen.quick else CASES
        for case, rule in itertools.product(cases, RULES):
            row = compare(old, case, rule, 5 if chosen.quick else 20)
            rows.append(row)
            print(
                f"{row['case']:22} {row['rule']:22} {row['old ms']:8.2f} ms {row['new ms']:8.2f} ms"
                f"  new / old {row['new / old']:.2f}",
                flush=True,
            )
    if not chosen.quick:
        chosen.output.mkdir(parents=True, exist_ok=True)
        name = "speed_against_training.json" if chosen.training else "speed_against.json"
        payload = {"conditions": conditions(), "results": rows}
        (chosen.output / name).write_text(json.dumps(payload, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
