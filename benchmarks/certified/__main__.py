"""``python -m benchmarks.certified run [BLOCK ...]`` or ``table``: measure, then show.

Each run is one JSON file; a run whose file is there is not repeated, so the work may be stopped at
any time and goes on where it was, and several processes started alike share it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .._record import FOLDER, conditions
from .._shared import alone
from . import gpu
from .plan import Run, blocks, settled

RESULTS = FOLDER / "certified"


def read(folder: Path) -> list[dict[str, Any]]:
    """All results, by file name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run is made and where its results go."""

    folder: Path
    root: str | None = None
    device: str = "cpu"
    until: float | None = None  # time.monotonic(), by which long runs are to end


def result_of(run: Run, place: Place, *, wait: bool = True) -> dict[str, Any] | None:
    """The result of a run, measured now if its file is missing.

    None where another process is at it and is not waited for.
    """
    path = place.folder / f"{run.name}.json"
    with alone(path, wait=wait) as mine:
        if path.is_file():
            return json.loads(path.read_text())
        if not mine:
            return None
        from .training import measure

        # what takes long is cut to the time that is left; the others are all alike
        until = place.until if run.group.startswith("cifar36") else None
        keep = path.with_suffix(".pt")
        result = measure(run, place.root, place.device, until=until, keep=keep)
        _say(run, result)
        result["conditions"] = conditions()
        part = path.with_suffix(".part")  # in one piece: nobody reads half a file
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(path)
        return result


def _say(run: Run, result: dict[str, Any]) -> None:
    shown = (
        "diverged"
        if result.get("diverged")
        else (f"clean {100 * result['clean']:.2f} verified {100 * result['verified']:.2f}")
    )
    print(f"{run.name}: {shown} in {result['minutes']:.2f} min", flush=True)


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


def every_block(seeds: int = 5) -> Iterator[tuple[str, list[Any]]]:
    """Those of the processor, then those of the GPU, whose names end in "-gpu"."""
    yield from blocks(seeds)
    yield from gpu.blocks(seeds)


def work(names: list[str], place: Place, minutes: float, seeds: int) -> None:
    """Go through the blocks in order until the time is up."""
    end = time.monotonic() + 60 * minutes
    for name, items in every_block(seeds):
        # each on its own kind of machine, unless it is asked for by name
        if name not in (names or [name]) or (
            not names and name.endswith("-gpu") != (place.device == "cuda")
        ):
            continue
        runs = [item for item in items if isinstance(item, Run)]
        tried = [item for item in items if not isinstance(item, Run)]
        # what others are at is not waited for as long as there is something else to do
        for run in (*runs, *(run for tries, _ in tried for run in tries)):
            if time.monotonic() > end:
                return
            result_of(run, place, wait=False)
        later = [base for _, base in tried]
        # each process begins with another method, so that they do not wait for one another
        for k in range(len(tried)):
            k = (k + os.getpid()) % len(tried)
            tries, base = tried[k]
            best = chosen(tries, lambda run: (result_of(run, place) or {}).get("verified", -1.0))
            if time.monotonic() > end:
                return
            later[k] = settled(base, best)
        # seed by seed, so that a table that is cut off compares like with like
        for seed in range(seeds):
            for base in later:
                if time.monotonic() > end:
                    return
                result_of(dataclasses.replace(base, seed=seed), place, wait=False)


def main() -> None:
    """Parse the command line and work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certified", description=__doc__)
    parser.add_argument("action", choices=("run", "table"))
    names = [name for name, _ in every_block()]
    parser.add_argument("blocks", nargs="*", help=", ".join(names))
    parser.add_argument("--root", default=os.environ.get("LRMANIFOLD_DATA"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--until", type=float, help="minutes, by which runs on CIFAR-10 are to end")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_intermixed_args()
    if unknown := sorted(set(options.blocks) - set(names)):
        parser.error(f"blocks must be some of {', '.join(names)}, got {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    options.results.mkdir(parents=True, exist_ok=True)
    until = None if options.until is None else time.monotonic() + 60 * options.until
    place = Place(options.results, options.root, options.device, until)
    if options.action == "run":
        work(options.blocks, place, options.minutes, options.seeds)
        return
    from .table import write

    write(read(options.results), options.results)


if __name__ == "__main__":
    main()
