"""Matrix completion 2000 x 2000, rank 10, to relative residual 1e-6: ours against pymanopt.

The same entries, start, sparse kernel and stopping rule for all; float64. Runs on the CPU only.
numpy's BLAS takes its threads from the environment alone: set OMP_NUM_THREADS to ``--threads``.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.completion [--threads 1] [--quick] [--output DIR]
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ._plot import Panel
from ._run import Report, Settings, main
from ._timing import interleave

REFERENCE = "pymanopt FixedRankEmbedded, CG"


def measure(settings: Settings) -> Report:
    """Completion to the same residual: seconds, residual evaluations, ratio to pymanopt's CG."""
    columns = {
        "case": "problem",
        "name": "by",
        "seconds_median": "s",
        "ratio": "/ pymanopt",
        "residuals": "residuals",
        "residual": "reached",
        "note": "note",
    }
    try:
        from ._completion import Completion, condlr, ours_in_pymanopt, pymanopt_own
    except ImportError as missing:
        return Report(
            columns, [{"case": "", "name": REFERENCE, "note": f"not installed: {missing}"}]
        )
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    sizes = settings.pick(((500, 10), (1000, 10), (2000, 10)), ((60, 3),))
    cases = {f"{size}x{size} rank {rank}": (size, rank) for size, rank in sizes}
    for case, (size, rank) in settings.chosen(cases).items():
        problem = Completion(size, rank)
        methods: dict[str, Any] = {
            "CondLR, fixed rate": condlr,
            "our manifold in pymanopt's CG": ours_in_pymanopt,
            REFERENCE: pymanopt_own,
        }
        found = {name: problem.solve(method) for name, method in methods.items()}
        tasks = {name: partial(problem.solve, method) for name, method in methods.items()}
        samples = interleave(
            tasks, device=torch.device("cpu"), rounds=settings.pick(5, 1), warmup=0
        )
        for name in methods:
            seconds = samples.time(name)
            row = {"case": case, "name": name, **found[name]}
            row |= {"seconds": seconds, "seconds_median": seconds.median}
            row |= {"ratio": samples.ratio(name, REFERENCE)}
            rows.append(row | ({} if found[name]["reached"] else {"note": "did not get there"}))
            value = seconds.median if found[name]["reached"] else math.nan
            lines.setdefault(name, []).append((size, value))
    picture = Panel("completion to 1e-6", "m = n", "s", lines)
    return Report(columns, rows, [picture])


if __name__ == "__main__":
    main("completion", measure)
