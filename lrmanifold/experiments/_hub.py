"""Image data sets of the Hugging Face hub, or of a folder in its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._bounded import MOST_IMAGES, decoded

PREFIX = "hf:"
# Where the hub keeps what this library knows.
REPOSITORIES = {
    "mnist": "ylecun/mnist",
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
}
_SHAPES = {"mnist": (28, 28), "fashion-mnist": (28, 28), "cifar10": (32, 32, 3)}
# Columns by the names that these repositories use.
_IMAGES, _LABELS = ("image", "img"), ("label", "labels")

Part = tuple[Tensor, Tensor]


def read(name: str, source: str) -> tuple[Part, Part, tuple[str, ...]]:
    """Training part, test part and class names of a data set.

    Parameters
    ----------
    name : str
        A key of :data:`REPOSITORIES`.
    source : str
        A repository (``user/name``), a local folder, or empty for the known repository.

    Raises
    ------
    ValueError
        If it cannot be had, or is not what `name` says.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{PREFIX} needs Hugging Face datasets, not installed: pip install 'lrmanifold[hub]'"
        ) from error
    if name not in REPOSITORIES:
        raise ValueError(f"root={PREFIX!r} serves {', '.join(REPOSITORIES)}, not {name!r}")
    source = source or REPOSITORIES[name]
    parts, names = [], None
    for split in ("train", "test"):
        try:
            rows = datasets.load_dataset(source, split=split)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"{source}: no split {split!r} could be loaded ({error})") from error
        image, label = (_column(source, rows.column_names, known) for known in (_IMAGES, _LABELS))
        kind = rows.features[label]
        if not isinstance(kind, datasets.ClassLabel) or kind.num_classes != 10:
            raise ValueError(f"{source}: {label} must be a ClassLabel of 10 classes, got {kind}")
        if names is not None and names != tuple(kind.names):
            raise ValueError(f"{source}: classes of test are {kind.names}, of train {names}")
        names, labels = tuple(kind.names), torch.tensor(list(rows[label]))
        if int(labels.min()) < 0:
            raise ValueError(f"{source}: {split} has images without a label")
        if len(rows) > MOST_IMAGES:
            raise ValueError(
                f"{source}: {split} has {len(rows)} rows, at most {MOST_IMAGES} are read"
            )
        # undecoded: what an image would unpack to is checked first
        files = rows.cast_column(image, datasets.Image(decode=False))[image]
        parts.append((_images(f"{source}: {split}", files, _SHAPES[name]), labels))
    assert names is not None
    return parts[0], parts[1], names


def _column(source: str, found: list[str], known: tuple[str, ...]) -> str:
    for name in known:
        if name in found:
            return name
    raise ValueError(f"{source}: must have a column {' or '.join(known)}, got {found}")


def _images(where: str, files: Any, shape: tuple[int, ...]) -> Tensor:
    """Decoded images, shape (N, C, H, W) in [0, 1]."""
    pixels = np.empty((len(files), *shape), dtype=np.uint8)
    for i, file in enumerate(files):
        data, path = file["bytes"], file["path"]
        if data is None:
            try:
                data = Path(path).read_bytes()
            except OSError as error:
                raise ValueError(f"{where} image {i} cannot be read ({error})") from error
        pixels[i] = decoded(f"{where} image {i}", data, shape, ["PNG", "JPEG"])
    x = torch.from_numpy(pixels).float().div_(255)
    return x[:, None] if len(shape) == 2 else x.permute(0, 3, 1, 2).contiguous()
