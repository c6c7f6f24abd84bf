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
import gzip
import hashlib
import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _hub

ENVIRONMENT_VARIABLE = "LRMANIFOLD_DATA"
_DIGITS = "0123456789"


class DataError(ValueError):
    """A data file is missing, truncated, foreign or contradicts another one."""


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
    if name not in _LOADERS:
        raise DataError(f"name must be one of {', '.join(map(repr, _LOADERS))}, got {name!r}")
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
    if len(x) != len(y):
        raise ValueError(f"x and y must be equally long, got {len(x)} and {len(y)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
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
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
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
        raise DataError(f"digits ships with scikit-learn: root must be None, got {root}")
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
        x = _read_idx(_either(folder, images), (28, 28))
        path = _either(folder, labels)
        y = _read_idx(path, ())
        _check_labels(path, y, len(x), 10)
        md5 = hashlib.md5(_idx_bytes(path), usedforsecurity=False).hexdigest()
        known = _IDX_LABELS.get(md5, (name, part))
        if known != (name, part):
            raise DataError(f"{path}: holds the {known[1]} labels of {known[0]}, not {name} {part}")
        parts.append((x[:, None].float().div_(255), y.long()))
    names = tuple(_CLOTHES.split(",") if name == "fashion-mnist" else _DIGITS)
    return _dataset(name, parts[0], parts[1], names, "")


def _either(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder / stem}: missing, and so is {stem}.gz")


def _idx_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked, damaged or truncated ({error})") from error


def _read_idx(path: Path, item: tuple[int, ...]) -> Tensor:
    """The bytes of an IDX file, shape (N, *item), N >= 1."""
    raw = _idx_bytes(path)
    magic = 0x0801 + len(item)
    start = 4 * (2 + len(item))
    words = [int.from_bytes(raw[i : i + 4], "big") for i in range(0, start, 4)]
    if len(raw) >= 4 and words[0] != magic:
        raise DataError(
            f"{path}: starts with {words[0]:#010x}, expected {magic:#010x} "
            f"(IDX, unsigned bytes, {1 + len(item)} dimensions)"
        )
    if len(raw) < start:
        raise DataError(f"{path}: truncated, {len(raw)} bytes, the header alone has {start}")
    count, size = words[1], tuple(words[2:])
    if size != item or count < 1:
        raise DataError(f"{path}: holds {count} items of size {size}, expected 1+ of {item}")
    expected = start + count * math.prod(item)
    if len(raw) != expected:
        what = "truncated" if len(raw) < expected else "too long"
        raise DataError(f"{path}: {what}, {len(raw)} bytes unpacked, expected {expected}")
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).view(count, *item)


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


def _read_jpegs(path: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images (N, 3, 32, 32), labels (N,) and class names of one ``.npz`` file."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "cifar10's JPEG images need Pillow, not installed: pip install 'lrmanifold[demo]'"
        ) from error
    jpeg, offsets, labels, names = _read_npz(path)
    last = len(labels)
    whole = len(offsets) == last + 1 and offsets[0] == 0 and offsets[-1] == len(jpeg)
    if not whole or not bool((np.diff(offsets.astype(np.int64)) > 0).all()):
        raise DataError(
            f"{path}: offsets must be {last + 1} increasing numbers from 0 to {len(jpeg)} (labels "
            f"+ 1, bytes of jpeg), got {len(offsets)} from {offsets[:1]} to {offsets[-1:]}"
        )
    if len(names) != 10:
        raise DataError(f"{path}: names must hold 10 class names, got {len(names)}")
    y = torch.from_numpy(labels.astype(np.int64))
    _check_labels(path, y, last, 10)
    pixels = np.empty((last, 32, 32, 3), dtype=np.uint8)
    for i in range(last):
        data = jpeg[offsets[i] : offsets[i + 1]].tobytes()
        try:
            with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
                found = np.asarray(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: image {i} is no whole JPEG file ({error})") from error
        if found.shape != (32, 32, 3):
            raise DataError(f"{path}: image {i} has shape {found.shape}, expected (32, 32, 3)")
        pixels[i] = found
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous().div_(255)
    return x, y, tuple(str(name) for name in names)


def _read_npz(path: Path) -> list[np.ndarray[Any, Any]]:
    kinds = {"jpeg": "u", "offsets": "iu", "labels": "iu", "names": "U"}
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: is no .npz archive, or truncated")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {key: archive[key] for key in archive.files if key in kinds}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read, damaged ({error})") from error
    if missing := sorted(set(kinds) - set(found)):
        raise DataError(f"{path}: has no array {missing}, expected {sorted(kinds)}")
    arrays = [found[key] for key in kinds]
    for (key, kind), array in zip(kinds.items(), arrays, strict=True):
        if array.ndim != 1 or array.dtype.kind not in kind or len(array) == 0:
            raise DataError(
                f"{path}: {key} must be one-dimensional, not empty, of kind {kind!r}, got "
                f"{array.dtype} {array.shape}"
            )
    return arrays


# ------------------------------------------------------------------------------- shared parts

_LOADERS: dict[str, Callable[[str, str | os.PathLike[str] | None], Dataset]] = {
    "digits": _load_digits,
    "mnist": _load_idx,
    "fashion-mnist": _load_idx,
    "cifar10": _load_cifar10,
}
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
        source = ENVIRONMENT_VARIABLE if root is None else "root"
        raise DataError(f"{source} is no folder: {tops[0]}")
    folders = [top / below for top in tops for below in _FOLDERS[name]]
    if root is None and name == "fashion-mnist":
        # the standard places for shared data (XDG base directory specification)
        shares = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        folders += [Path(share) / "datasets" / name for share in shares.split(":") if share]
    for folder in folders:
        if any((folder / file).is_file() for file in files):
            return folder
    looked = ", ".join(map(str, folders)) or "nowhere (root and the variable are not set)"
    raise DataError(
        f"{name} was not found; looked in {looked}. Needed: {_SOURCES[name]}. Name their folder, "
        f"or the one above it, by root or by the environment variable {ENVIRONMENT_VARIABLE}"
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
