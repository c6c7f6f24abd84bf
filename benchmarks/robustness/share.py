"""Families of plans in several processes at once, and what they would all compute alike."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lrmanifold.experiments import data as datasets
from lrmanifold.experiments.data import Dataset

AGAIN = 75  # the time ran out: call again (EX_TEMPFAIL)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """While no other process is in here with the same file; the system frees it if one dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def spread(
    command: Callable[[str, str, float], Sequence[str]],
    tasks: Sequence[tuple[str, str]],
    processes: int,
    minutes: float,
) -> int:
    """Run ``command(plan, family, minutes left)`` for all tasks, so many at once; the status.

    Each writes its rows to the tables of the plan. 0 if all ended well, `AGAIN` if the time ran
    out, else the first other status.
    """
    end = time.monotonic() + 60 * minutes

    def one(task: tuple[str, str]) -> int:
        left = (end - time.monotonic()) / 60
        return subprocess.run(command(*task, left)).returncode if left > 0 else AGAIN

    with ThreadPoolExecutor(processes) as pool:
        found = set(pool.map(one, tasks))
    broken = sorted(found - {0, AGAIN})
    return broken[0] if broken else max(found, default=0)


def decoded(root: str | None, scratch: Path) -> Dataset:
    """CIFAR-10, its JPEG images decoded once and kept in `scratch` as bytes."""
    folder = root or os.environ.get(datasets.ENVIRONMENT_VARIABLE, "")
    files = sorted(Path(folder).expanduser().rglob("*.npz")) if folder else []
    known = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    if not known:
        return datasets.load("cifar10", root)
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]
    path = scratch / f"cifar10-{key}.pixels.pt"
    with alone(path.with_suffix(".lock")):
        if not path.is_file():
            data = datasets.load("cifar10", root)
            parts = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
            for name in ("train_x", "test_x"):
                parts[name] = (parts[name] * 255).round().to(torch.uint8)
            part = path.with_suffix(".part")
            torch.save(parts, part)
            part.replace(path)
            return data
    parts = torch.load(path, weights_only=True)
    for name in ("train_x", "test_x"):
        parts[name] = parts[name].float().div_(255)  # as the loader makes them: equal to the bit
    return Dataset(**parts)
