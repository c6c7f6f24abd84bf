"""Image data sets from local files, whole or not at all.

========================  ==============================================  ====================
name                      files                                           images
========================  ==============================================  ====================
``digits``                shipped with scikit-learn                       1 x 8 x 8, 1,797
``mnist``                 four IDX files, gzipped or not                  1 x 28 x 28, 70,000
``fashion-mnist``         four IDX files, gzipped or not                  1 x 28 x 28, 70,000
``cifar10``               ``train.npz``, ``test.npz`` (re-encoded JPEG)   3 x 32 x 32, 60,000
========================  ==============================================  ====================

Nothing is downloaded, unless asked for by ``root="hf:"`` (Hugging Face ``datasets``). Every file is
checked in full before a :class:`Dataset` exists; whatever is wrong with one raises
:class:`DataError`, which names the file and what was expected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import (
    check_flag,
    check_instance,
    check_integer,
    check_number,
    check_numbers,
    check_path,
    check_tensor,
)
from . import _hub
from ._bounded import MOST_IMAGES, Column, DataError, decoded, read_idx, read_npz, read_parts

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "NAMES",
    "DataError",
    "Dataset",
    "batches",
    "load",
    "validation_split",
]

ENVIRONMENT_VARIABLE = "LRMANIFOLD_DATA"
_DIGITS = "0123456789"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images in [0, 1] and their classes, in memory.

    Attributes
    ----------
    name : str
    train_x, test_x : Tensor, shape (N, C, H, W), float32 in [0, 1], not normalised
    train_y, test_y : Tensor, shape (N,), int64 in 0..classes - 1
    classes : int
    class_names : tuple of str
    mean, std : tuple of C floats
        Of the training images' pixels, per channel; std is 1 for a channel that never varies.
    note : str
        What to say wherever a figure from this data is shown; may be empty.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width


def check_dataset(name: str, value: Any) -> Dataset:
    """Refuse what is no :class:`Dataset`, and training data that no training would refuse."""
    check_instance(name, value, Dataset, "a Dataset, as experiments.data.load gives")
    x, y, top = value.train_x, value.train_y, value.classes - 1
    check_tensor(f"{name}.train_x", x, shape=(None,) * 4)
    if not x.numel():
        raise ValueError(f"{name}.train_x must hold at least one image, got shape {tuple(x.shape)}")
    check_images(f"{name}.train_x", x)
    check_tensor(f"{name}.train_y", y, shape=(len(x),), real=False, dtypes={torch.int64})
    low, high = (int(v) for v in y.aminmax())
    if low < 0 or high > top:  # torch leaves out examples of class -100
        raise ValueError(f"{name}.train_y must be classes in 0..{top}, got {low}..{high}")
    check_numbers(f"{name}.mean", value.mean, x.shape[1])
    check_numbers(f"{name}.std", value.std, x.shape[1], low=0.0, open_low=True)
    return value


def check_images(name: str, x: Tensor) -> None:
    """Refuse what are no images in [0, 1], up to rounding."""
    check_tensor(name, x)
    low, high = (float(v) for v in x.aminmax()) if x.numel() else (0.0, 0.0)
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ValueError(
            f"{name} must be images in [0, 1], got numbers in [{low:g}, {high:g}]: give them "
            "before normalisation, and put that into the model"
        )


def load(name: str, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Read a data set, or raise :class:`DataError`.

    Parameters
    ----------
    name : "digits", "mnist", "fashion-mnist" or "cifar10"
    root : path, optional
        The data set's own folder or the folder above it (``root/mnist``, or torchvision's
        ``root/MNIST/raw``). None looks into the folder that the environment variable
        LRMANIFOLD_DATA names, then, for ``fashion-mnist``, where Debian's package
        dataset-fashion-mnist puts it. ``digits`` takes none. "hf:" fetches all but ``digits`` from
        the Hugging Face hub, "hf:user/name" from that repository, "hf:/folder" reads a local one in
        its layout; with the package ``datasets`` (``pip install 'lrmanifold[hub]'``).
    """
    if not isinstance(name, str) or name not in _LOADERS:
        raise DataError(f"name must be one of {', '.join(map(repr, _LOADERS))}, got {name!r}")
    if root is not None:
        root = check_path("root", root)
    named = os.environ.get(ENVIRONMENT_VARIABLE) if root is None and name != "digits" else root
    if isinstance(named, str) and named.startswith(_hub.PREFIX):
        source = named.removeprefix(_hub.PREFIX)
        try:
            train, test, names = _hub.read(name, source)
        except ValueError as error:
            raise DataError(str(error)) from error
        origin = source or _hub.REPOSITORIES[name]
        return _dataset(name, train, test, names, f"From {origin}, by Hugging Face datasets.")
    return _LOADERS[name](name, root)


def batches(
    x: Tensor,
    y: Tensor,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    shuffle: bool = True,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go once through (x, y) in batches of `batch_size`, the last one maybe smaller.

    The order depends on the generator's state alone (None: torch's global one). Each pass draws a
    new permutation from it, so epochs differ and a run repeats when its generator is seeded alike.
    """
    check_tensor("x", x, real=False)
    check_tensor("y", y, real=False)
    check_flag("shuffle", shuffle)
    if x.ndim == 0 or y.ndim == 0:
        raise ValueError("x and y must have a first dimension, of examples")
    if len(x) != len(y):
        raise ValueError(f"x and y must be equally long, got {len(x)} and {len(y)}")
    # all examples at most: torch splits by no integer beyond 64 bits
    batch_size = min(check_integer("batch_size", batch_size, low=1), max(1, len(x)))
    if generator is not None:
        check_instance("generator", generator, torch.Generator, "a torch.Generator or None")
    if not shuffle:
        return zip(x.split(batch_size), y.split(batch_size), strict=True)
    device = None if generator is None else generator.device
    order = torch.randperm(len(x), generator=generator, device=device).to(x.device)
    return ((x[i], y[i]) for i in order.split(batch_size))


def validation_split(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """A data set whose *test* part is a share of the old training part; the old test part is gone.

    For tuning without a look at the test images. The share is taken class by class (rounded, at
    least one image each way), at random by `seed`; mean and std are the remaining images'.
    """
    check_dataset("dataset", dataset)
    limits: dict[str, Any] = {"low": 0.0, "high": 1.0, "open_low": True, "open_high": True}
    fraction = check_number("fraction", fraction, **limits)
    seed = check_integer("seed", seed, low=-(2**63), high=2**64 - 1)
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(dataset.train_y), dtype=torch.bool)
    for label in range(dataset.classes):
        members = (dataset.train_y == label).nonzero()[:, 0].cpu()
        if len(members) < 2:
            raise ValueError(f"class {label} has {len(members)} training images, needs at least 2")
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    held_out = held_out.to(dataset.train_y.device)
    x, y = dataset.train_x, dataset.train_y
    mean, std = _moments(x[~held_out])
    note = f"test part = {fraction:g} of the training images (validation split, seed {seed})"
    return dataclasses.replace(
        dataset,
        train_x=x[~held_out],
        train_y=y[~held_out],
        test_x=x[held_out],
        test_y=y[held_out],
        mean=mean,
        std=std,
        note=f"{dataset.note} {note}".strip(),
    )


# ------------------------------------------------------------------------------------- digits


def _load_digits(name: str, root: str | os.PathLike[str] | None) -> Dataset:
    """scikit-learn's digits. Within each class, in the file's order, every fifth image is test.

    No random numbers: the split is the same for every version of every library.
    """
    if root is not None:
        raise DataError(
            f"digits ships with scikit-learn: root must be None (no --root on the command line), "
            f"got {root}"
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits come with scikit-learn, not installed: pip install 'lrmanifold[demo]'"
        ) from error
    raw = load_digits()
    x = torch.from_numpy(np.asarray(raw.images, dtype=np.float32))[:, None] / 16
    y = torch.from_numpy(np.asarray(raw.target, dtype=np.int64))
    rank_in_class = torch.zeros_like(y)
    for label in range(10):
        rank_in_class[y == label] = torch.arange(int((y == label).sum()))
    test = rank_in_class % 5 == 4
    note = "8 x 8 digits of scikit-learn; split by lrmanifold (every fifth image of a class)."
    return _dataset(name, (x[~test], y[~test]), (x[test], y[test]), tuple(_DIGITS), note)


# ---------------------------------------------------------------------------------- IDX files

_CLOTHES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_IDX_PARTS = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# MD5 of the original label files, unpacked. MNIST and Fashion-MNIST use the same file names and
# sizes: without this one could be trained on under the name of the other.
_IDX_LABELS = {
    "a25bea736e30d166cdddb491f175f624": ("mnist", "train"),
    "27ae3e4e09519cfbb04c329615203637": ("mnist", "test"),
    "9018921c3c673c538a1fc5bad174d6f9": ("fashion-mnist", "train"),
    "15d484375f8d13e6eb1aabb0c3f46965": ("fashion-mnist", "test"),
}


def _load_idx(name: str, root: str | os.PathLike[str] | None) -> Dataset:
    stems = [stem for part in _IDX_PARTS.values() for stem in part]
    folder = _folder(name, root, [stem + end for stem in stems for end in ("", ".gz")])
    parts: list[tuple[Tensor, Tensor]] = []
    for part, (images, labels) in _IDX_PARTS.items():
        raw, start, count = read_idx(_either(folder, images), (28, 28))
        pixels = torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8)
        path = _either(folder, labels)
        raw, start, _ = read_idx(path, ())
        y = torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8)
        _check_labels(path, y, count, 10)
        md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        known = _IDX_LABELS.get(md5, (name, part))
        if known != (name, part):
            raise DataError(f"{path}: holds the {known[1]} labels of {known[0]}, not {name} {part}")
        x = pixels.view(count, 1, 28, 28).float().div_(255)
        parts.append((x, y.long()))
    names = tuple(_CLOTHES.split(",") if name == "fashion-mnist" else _DIGITS)
    return _dataset(name, parts[0], parts[1], names, "")


def _either(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder / stem}: missing, and so is {stem}.gz")


# ------------------------------------------------------------------------------------ CIFAR-10


def _load_cifar10(name: str, root: str | os.PathLike[str] | None) -> Dataset:
    folder = _folder(name, root, ["train.npz", "test.npz"])
    for file in ("train.npz", "test.npz"):  # both, before decoding one
        if not (folder / file).is_file():
            raise DataError(f"{folder / file}: missing")
    *train, names = _read_jpegs(folder / "train.npz")
    *test, test_names = _read_jpegs(folder / "test.npz")
    if names != test_names:
        raise DataError(f"{folder / 'test.npz'}: names {test_names}, train.npz has {names}")
    note = (
        "CIFAR-10 re-encoded as JPEG by its publisher: accuracy is a little below the original's "
        "and never directly comparable with published tables."
    )
    return _dataset(name, (train[0], train[1]), (test[0], test[1]), names, note)


_CIFAR = {
    "labels": Column("iu", MOST_IMAGES),
    "names": Column("U", 1000, 1024),
    "offsets": Column("iu", MOST_IMAGES + 1),
}


def _read_jpegs(path: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (N, 3, 32, 32), labels (N,) and class names of one ``.npz`` file."""
    if importlib.util.find_spec("PIL") is None:
        raise ImportError(
            "cifar10's JPEG images need Pillow, not installed: pip install 'lrmanifold[demo]'"
        )
    labels, names, offsets = read_npz(path, _CIFAR)
    count = len(labels)
    if len(offsets) != count + 1:
        raise DataError(
            f"{path}: offsets must be {count + 1} increasing numbers (labels + 1), got "
            f"{len(offsets)}"
        )
    if len(names) != 10:
        raise DataError(f"{path}: names must hold 10 class names, got {len(names)}")
    y = torch.from_numpy(labels.astype(np.int64))
    _check_labels(path, y, count, 10)
    pixels = np.empty((count, 32, 32, 3), dtype=np.uint8)
    for i, data in enumerate(read_parts(path, "jpeg", offsets)):
        pixels[i] = decoded(f"{path}: image {i}", data, (32, 32, 3), ["JPEG"])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous().div_(255)
    return x, y, tuple(str(name) for name in names)


# ------------------------------------------------------------------------------- shared parts

_LOADERS: dict[str, Callable[[str, str | os.PathLike[str] | None], Dataset]] = {
    "digits": _load_digits,
    "mnist": _load_idx,
    "fashion-mnist": _load_idx,
    "cifar10": _load_cifar10,
}
NAMES = tuple(_LOADERS)
_FOLDERS = {
    "mnist": ("mnist", "MNIST/raw", "."),
    "fashion-mnist": ("fashion-mnist", "FashionMNIST/raw", "."),
    "cifar10": ("cifar10-jpeg", "cifar10", "."),
}
_SOURCES = {
    "mnist": "the four IDX files of Y. LeCun's MNIST database, gzipped or not",
    "fashion-mnist": "Debian's package dataset-fashion-mnist, or the four IDX files of "
    "zalandoresearch/fashion-mnist",
    "cifar10": "train.npz and test.npz with the arrays jpeg (all files joined), offsets, labels "
    "and names",
}


def _folder(name: str, root: str | os.PathLike[str] | None, files: list[str]) -> Path:
    """The first folder in question that has at least one of the files."""
    named = os.environ.get(ENVIRONMENT_VARIABLE) if root is None else root
    tops = [Path(named).expanduser()] if named else []
    if tops and not tops[0].is_dir():
        source = ENVIRONMENT_VARIABLE if root is None else "root (--root)"
        raise DataError(f"{source} is no folder: {tops[0]}")
    folders = [top / below for top in tops for below in _FOLDERS[name]]
    if root is None and name == "fashion-mnist":
        # the standard places for shared data (XDG base directory specification)
        shares = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        folders += [Path(share) / "datasets" / name for share in shares.split(":") if share]
    for folder in folders:
        if any((folder / file).is_file() for file in files):
            return folder
    looked = f"; looked in {', '.join(map(str, folders))}" if folders else ": no folder was named"
    raise DataError(
        f"{name} was not found{looked}. Needed: {_SOURCES[name]}. Name their folder, "
        f"or the one above it, by root (on the command line --root DIR) or by the environment "
        f"variable {ENVIRONMENT_VARIABLE}"
    )


def _check_labels(path: Path, y: Tensor, images: int, classes: int) -> None:
    if len(y) != images:
        raise DataError(f"{path}: {len(y)} labels for {images} images")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise DataError(
            f"{path}: labels must be in 0..{classes - 1}, got {int(y.min())}..{int(y.max())}"
        )


def _moments(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, C, H, W), summed in float64."""
    first, second = torch.zeros(2, x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(4096):
        pixels = part.double()
        first += pixels.sum((0, 2, 3))
        second += pixels.square().sum((0, 2, 3))
    count = x.numel() // x.shape[1]
    mean = first / count
    std = (second / count - mean.square()).clamp_min(0).sqrt()
    return tuple(mean.tolist()), tuple(torch.where(std > 1e-8, std, 1.0).tolist())


def _dataset(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    class_names: tuple[str, ...],
    note: str,
) -> Dataset:
    mean, std = _moments(train[0])
    return Dataset(name, *train, *test, len(class_names), class_names, mean, std, note)
