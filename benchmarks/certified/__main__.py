"""``python -m benchmarks.certified run [BLOCK ...]`` or ``table``: measure, then show.

Each run is one JSON file; a run whose file is there is not repeated, so the work may be stopped at
any time and goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .._record import FOLDER, conditions
from .plan import Run, blocks

RESULTS = FOLDER / "certified"


def read(folder: Path) -> list[dict[str, Any]]:
    """All results, by file name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def result_of(run: Run, folder: Path, root: str | None) -> dict[str, Any]:
    """The result of a run, measured now if its file is missing."""
    from .training import measure

    path = folder / f"{run.name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    result = {**measure(run, root), "conditions": conditions()}
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)
    shown = (
        "diverged"
        if result.get("diverged")
        else (f"clean {100 * result['clean']:.2f} verified {100 * result['verified']:.2f}")
    )
    print(f"{run.name}: {shown} in {result['minutes']:.1f} min", flush=True)
    return result


def chosen(tries: list[Run], verified: Callable[[Run], float], further: int = 3) -> Run:
    """The best of some tries; a rate at the end of those tried is followed further.

    With the best run's other settings, by the same factor, until the best rate has a neighbour on
    both sides or `further` more were tried.
    """
    found = {run: verified(run) for run in tries}
    for _ in range(further + 1):
        best = max(found, key=lambda run: found[run])
        like = [r for r in found if dataclasses.replace(r, lr=best.lr) == best]
        rates = sorted(run.lr for run in like)
        if len(rates) < 2 or best.lr not in (rates[0], rates[-1]):
            break
        factor = rates[1] / rates[0] if best.lr == rates[-1] else rates[0] / rates[1]
        beyond = dataclasses.replace(best, lr=float(f"{best.lr * factor:.2g}"))
        if len(found) == len(tries) + further:
            break
        found[beyond] = verified(beyond)
    return best


def work(names: list[str], folder: Path, root: str | None, minutes: float, seeds: int) -> None:
    """Go through the blocks in order until the time is up."""
    end = time.monotonic() + 60 * minutes
    for name, items in blocks(seeds):
        if names and name not in names:
            continue
        later: list[Run] = []
        for item in items:
            if time.monotonic() > end:
                return
            if isinstance(item, Run):
                result_of(item, folder, root)
                continue
            tries, base = item
            best = chosen(tries, lambda run: result_of(run, folder, root).get("verified", -1.0))
            later.append(dataclasses.replace(base, lr=best.lr, head=best.head, kind=best.kind))
        # seed by seed, so that a table that is cut off compares like with like
        for seed in range(seeds):
            for base in later:
                if time.monotonic() > end:
                    return
                result_of(dataclasses.replace(base, seed=seed), folder, root)


def main() -> None:
    """Parse the command line and work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certified", description=__doc__)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument(
        "blocks",
        nargs="*",
        help=", ".join(name for name, _ in blocks()),
    )
    parser.add_argument("--root", default=os.environ.get("LRMANIFOLD_DATA"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    options.results.mkdir(parents=True, exist_ok=True)
    if options.action == "run":
        work(options.blocks, options.results, options.root, options.minutes, options.seeds)
        return
    from .table import write

    write(read(options.results), options.results)


if __name__ == "__main__":
    main()
