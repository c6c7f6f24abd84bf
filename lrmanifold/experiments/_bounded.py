"""Reading files of strangers: sizes are checked before there is memory for them."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

# Images of one part: more than data sets of this kind have, and no memory yet to worry about.
MOST_IMAGES = 250_000
# Bytes of one image file of 32 x 32 pixels, with room for its metadata.
_MOST_BYTES = 2**16


class DataError(ValueError):
    """A data file is missing, truncated, foreign or contradicts another one."""


# ---------------------------------------------------------------------------------- IDX files


def read_idx(path: Path, item: tuple[int, ...]) -> tuple[bytes, int, int]:
    """An IDX file of items of one size, gzipped or not: its bytes, where items start, how many.

    The header says how many bytes must follow, and no more than these (and one) are unpacked.
    """
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            size = None if packed else os.fstat(file.fileno()).st_size
            file.seek(0)
            stream: Any = gzip.GzipFile(fileobj=file) if packed else file
            return _idx(path, stream, size, item)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be unpacked, damaged or truncated ({error})") from error


def _idx(
    path: Path, stream: BinaryIO, size: int | None, item: tuple[int, ...]
) -> tuple[bytes, int, int]:
    magic, start = 0x0801 + len(item), 4 * (2 + len(item))
    head = stream.read(start)
    words = [int.from_bytes(head[i : i + 4], "big") for i in range(0, start, 4)]
    if len(head) >= 4 and words[0] != magic:
        raise DataError(
            f"{path}: starts with {words[0]:#010x}, expected {magic:#010x} "
            f"(IDX, unsigned bytes, {1 + len(item)} dimensions)"
        )
    if len(head) < start:
        raise DataError(f"{path}: truncated, {len(head)} bytes, the header alone has {start}")
    count = words[1]
    if tuple(words[2:]) != item or count < 1:
        raise DataError(
            f"{path}: holds {count} items of size {tuple(words[2:])}, expected 1+ of {item}"
        )
    each = int(np.prod(item, dtype=np.int64))
    expected = start + count * each
    if size is not None and size < expected:
        raise DataError(f"{path}: truncated, {size} bytes unpacked, expected {expected}")
    if count > MOST_IMAGES:
        raise DataError(f"{path}: says that it holds {count} items, at most {MOST_IMAGES} are read")
    body = stream.read(expected - start + 1)
    found = start + len(body)
    if found != expected:
        what = "truncated, " if found < expected else "too long, at least "
        raise DataError(f"{path}: {what}{found} bytes unpacked, expected {expected}")
    return head + body, start, count


# ----------------------------------------------------------------------------------- archives


class Column(NamedTuple):
    """An array that a ``.npz`` file must have."""

    kinds: str  # of numpy's dtypes
    most: int  # items
    width: int = 8  # bytes of an item


def read_npz(path: Path, columns: dict[str, Column]) -> list[np.ndarray[Any, Any]]:
    """One-dimensional arrays of a ``.npz`` file, in the order of `columns`."""
    found = []
    for key, column in columns.items():
        with _npy(path, key, column) as (stream, count, dtype):
            size = count * dtype.itemsize
            data = stream.read(size + 1)  # one more: at its end the checksum is compared
            if len(data) != size:
                raise ValueError(f"{len(data)} bytes unpacked, expected {size}")
            found.append(np.frombuffer(data, dtype))
    return found


def read_parts(path: Path, key: str, offsets: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """The files that are joined in an array of bytes, one at a time: the whole is never unpacked.

    `offsets` holds where each begins, and the end of the last.
    """
    with _npy(path, key, Column("u", len(offsets) * _MOST_BYTES, 1)) as (stream, count, _):
        steps = np.diff(offsets.astype(np.int64))
        if offsets[0] != 0 or offsets[-1] != count or not bool((steps > 0).all()):
            raise DataError(
                f"{path}: offsets must be {len(offsets)} increasing numbers from 0 to {count} "
                f"(labels + 1, bytes of {key}), got {offsets[:1]} to {offsets[-1:]}"
            )
        for i, size in enumerate(steps.tolist()):
            if size > _MOST_BYTES:
                raise DataError(f"{path}: image {i} has {size} bytes, at most {_MOST_BYTES}")
            yield stream.read(size)
        if stream.read(1):
            raise ValueError(f"more than {count} bytes")


@contextlib.contextmanager
def _npy(path: Path, key: str, column: Column) -> Iterator[tuple[IO[bytes], int, np.dtype[Any]]]:
    """An array of a ``.npz`` file behind its checked header: a stream of so many items."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: is no .npz archive, or truncated")
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{key}.npy" not in archive.namelist():
                raise DataError(f"{path}: has no array [{key!r}]")
            member = archive.getinfo(f"{key}.npy")
            with archive.open(member) as stream:
                yield stream, *_header(f"{path}: {key}", stream, member.file_size, column)
    except DataError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read, damaged ({error})") from error


def _header(where: str, stream: IO[bytes], size: int, column: Column) -> tuple[int, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format .npy")
    shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if len(shape) != 1 or dtype.kind not in column.kinds or shape[0] == 0:
        raise DataError(
            f"{where} must be one-dimensional, not empty, of kind {column.kinds!r}, got {dtype} "
            f"{shape}"
        )
    if shape[0] > column.most or dtype.itemsize > column.width:
        raise DataError(
            f"{where} must have at most {column.most} items of {column.width} bytes, got "
            f"{shape[0]} of {dtype.itemsize}"
        )
    left = size - stream.tell()
    if shape[0] * dtype.itemsize != left:
        raise ValueError(f"{left} bytes for {shape[0]} items of {dtype.itemsize}")
    return shape[0], dtype


# ------------------------------------------------------------------------------------- images


def decoded(
    where: str, data: bytes, shape: tuple[int, ...], formats: list[str]
) -> np.ndarray[Any, Any]:
    """The pixels of an image file, of this shape (H, W) or (H, W, C); its header is checked first.

    Needs Pillow.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:  # reads the header only
            bands = len(image.getbands())
            size = (image.height, image.width, *((bands,) if bands > 1 else ()))
            if size != shape:
                raise DataError(f"{where} has shape {size}, expected {shape}")
            pixels = np.asarray(image)
    except DataError:
        raise
    except (
        OSError, SyntaxError, ValueError, EOFError, zlib.error,
        Image.DecompressionBombError,
    ) as error:  # fmt: skip
        raise DataError(f"{where} is no whole {' or '.join(formats)} file ({error})") from error
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise DataError(f"{where} must be {shape} bytes, got {pixels.shape} {pixels.dtype}")
    return pixels
