"""Every registered retraction, and the kernels that bring a tall matrix back to the Stiefel set.

python -m benchmarks.speed.retractions [--device cuda] [--threads 1] [--quick] [--output DIR]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lrmanifold as lrm
from lrmanifold import linalg, retractions

from ._plot import Panel
from ._run import Report, Settings, main
from ._timing import Shape, Task, interleave

SHAPES: tuple[Shape, ...] = (
    (256, 256, 16),
    (1024, 1024, 16),
    (4096, 4096, 16),
    (1024, 1024, 64),
    (1024, 1024, 128),
    (1024, 1024, 256),
    (512, 4608, 128),
    (4096, 4096, 64),
)
STEP = 0.01  # length of the step in units of σ_r


def kernels() -> dict[str, Callable[[Tensor], Any]]:
    """Ways to an orthonormal basis of the columns of an almost orthonormal tall matrix."""
    return {
        "linalg.orthonormalize": linalg.orthonormalize,
        "linalg.polar": linalg.polar,
        "torch.linalg.qr": torch.linalg.qr,
        "torch.geqrf + orgqr": lambda A: torch.linalg.householder_product(*torch.geqrf(A)),
    }


def _tasks(shape: Shape, device: torch.device) -> tuple[dict[str, Task], dict[str, Task]]:
    m, n, r = shape
    M = lrm.WellConditioned(m, n, r, tau=0.5)
    X = M.random(device=device).as_subclass(Tensor)
    free = lrm.FixedRank(m, n, r)
    xi = free.proju(X, torch.randn_like(X))
    xi = xi * (STEP * float(free.svdvals(X)[-1]) / float(xi.norm()))
    steps = {
        name: Task({"all": partial(retractions.get(name), free, X, xi)})
        for name in retractions.available()
    }
    A = free.unpack(X).U + free.unpack(xi).U
    tall = {name: Task({"all": partial(kernel, A)}) for name, kernel in kernels().items()}
    return steps, tall


def measure(settings: Settings) -> Report:
    """Retractions of packed points (ratio to `factored`), and tall kernels (ratio to QR)."""
    rate = settings.gemm_rate()
    rows: list[dict[str, Any]] = []
    cases = {f"{m}x{n} r {r}": (m, n, r) for m, n, r in settings.pick(SHAPES, ((48, 32, 4),))}
    for shape in settings.chosen(cases).values():
        m, n, r = shape
        steps, tall = _tasks(shape, settings.device)
        for kind, tasks, reference, length in (
            ("retraction", steps, "factored", m + n),
            ("kernel", tall, "torch.linalg.qr", m),
        ):
            samples = interleave(
                tasks,
                device=settings.device,
                rounds=settings.rounds,
                budget=settings.budget,
            )
            for name in tasks:
                seconds = samples.time(name)
                rows.append(
                    {
                        "kind": kind,
                        "name": name,
                        "shape": f"{m}x{n} r {r}" if kind == "retraction" else f"{m} r {r}",
                        "m": m,
                        "n": n,
                        "r": r,
                        "ms": seconds.median * 1e3,
                        "seconds": seconds,
                        "ratio": samples.ratio(name, reference),
                        "units": seconds.median * rate / (length * r * r),
                    }
                )
    columns = {
        "kind": "",
        "name": "name",
        "shape": "shape",
        "ms": "ms",
        "ratio": "/ reference",
        "units": "in (m+n)r² at GEMM rate",
    }
    return Report(columns, rows, _panels(rows), {"gemm_rate": rate})


def _panels(rows: list[dict[str, Any]]) -> list[Panel]:
    def lines(kind: str, x: str, fixed: dict[str, int]) -> dict[str, list[tuple[float, float]]]:
        found: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["kind"] == kind and all(row[k] == v for k, v in fixed.items()):
                found.setdefault(row["name"], []).append((row[x], row["ms"]))
        return {k: sorted(v) for k, v in found.items()}

    against_r, against_m = {"m": 1024, "n": 1024}, {"r": 16}
    return [
        Panel(f"{kind}s, {what}", x, "ms", lines(kind, x, fixed))
        for kind in ("retraction", "kernel")
        for x, what, fixed in (
            ("r", "m = n = 1024", against_r),
            ("m", "m = n, r = 16", against_m),
        )
    ]


if __name__ == "__main__":
    main("retractions", measure)
