"""What several processes share: work that one of them does, and images that are decoded once."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from lrmanifold.experiments import data as datasets
from lrmanifold.experiments.data import Dataset

# Of this user on this machine, whatever the checkout; it may be deleted while nothing runs.
SCRATCH = Path(tempfile.gettempdir()) / f"lrmanifold-{os.getuid()}"
_PIXELS = ("train_x", "test_x")


@contextlib.contextmanager
def alone(what: Path, *, wait: bool = True) -> Iterator[bool]:
    """True while this process alone is at `what`, the path of a result; not reentrant.

    Others wait, or get False at once without `wait`. A process that dies is no longer at anything:
    the system frees its lock.
    """
    name = hashlib.sha256(str(what.resolve()).encode()).hexdigest()[:16]
    SCRATCH.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(SCRATCH / f"{name}.lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def load(name: str, root: str | os.PathLike[str] | None) -> Dataset:
    """A data set; of CIFAR-10 the JPEG images are decoded once and kept as bytes in `SCRATCH`.

    Equal to the bit to what the loader gives. Decoded anew when the path, size or time of any
    ``.npz`` file below the folder of the data changes; other processes wait meanwhile. Digits and
    Fashion-MNIST come with packages, so `root` is not theirs.
    """
    if name != "cifar10":
        return datasets.load(name, None if name in ("digits", "fashion-mnist") else root)
    folder = root or os.environ.get(datasets.ENVIRONMENT_VARIABLE, "")
    files = sorted(Path(folder).expanduser().resolve().rglob("*.npz")) if folder else []
    known = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    if not known:
        return datasets.load(name, root)
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    path = SCRATCH / f"{name}-{key}.pt"
    with alone(path):
        if not path.is_file():
            data = datasets.load(name, root)
            parts = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
            parts |= {x: (parts[x] * 255).round().to(torch.uint8) for x in _PIXELS}
            part = path.with_suffix(".part")
            torch.save(parts, part)
            part.replace(path)
            return data
    parts = torch.load(path, weights_only=True)
    return Dataset(**parts | {x: parts[x].float().div_(255) for x in _PIXELS})
