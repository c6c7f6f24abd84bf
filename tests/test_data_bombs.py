"""Data files that unpack to more than they are: refused before there is memory for them."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from test_data import TEST_X, archive, arrays, jpegs, write, write_cifar

from lrmanifold.experiments.data import DataError, load


@pytest.fixture
def little_memory():
    """Fails if a test allocates much; numpy's and Python's memory is counted."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6, f"{peak / 1e6:.0f} MB"


def gzipped_zeros(head, size):
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (3, "too long, at least 2369 bytes unpacked, expected 2368"),
        (2**32 - 1, "says that it holds 4294967295 items, at most 250000 are read"),
    ],
)
def test_a_gzip_bomb_is_refused_before_it_unpacks(count, message, tmp_path, little_memory):
    files = arrays()
    write(tmp_path, files)
    (tmp_path / TEST_X).unlink()
    head = struct.pack(">BBBB", 0, 0, 8, 3) + struct.pack(">3I", count, 28, 28)
    (tmp_path / f"{TEST_X}.gz").write_bytes(gzipped_zeros(head, 200 * 2**20))
    with pytest.raises(DataError, match=message):
        load("mnist", tmp_path)


def npy(dtype, shape, body=b""):
    """A .npy file whose header may claim anything."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


NPZ_BOMBS = {
    "a header that claims 2**40 labels": (
        {"labels": npy("|u1", (2**40,), bytes(12))}, "labels must have at most 250000 items"
    ),
    "a header that claims more than there is": (
        {"labels": npy("|u1", (240_000,), bytes(12))}, "damaged .12 bytes for 240000 items of 1"
    ),
    "offsets of a huge type": (
        {"offsets": npy("<U1000000", (13,))}, "must be one-dimensional.*of kind 'iu'"
    ),
    "names that are huge": ({"names": npy("<U100000000", (10,))}, "names must have at most 1000"),
    "40 MB of images that compress well": (
        {"jpeg": npy("|u1", (40 * 2**20,), bytes(40 * 2**20))}, "jpeg must have at most 851968 it"
    ),
    "two dimensions": ({"labels": npy("|u1", (2**30, 2**30))}, "labels must be one-dimensional"),
    "Python objects": ({"labels": npy("|O", (12,))}, "damaged .it holds Python objects"),
    "another version": ({"labels": b"\x93NUMPY\x09\x00"}, "damaged"),
    "no array at all": ({"labels": b"hello"}, "damaged"),
    "nothing": ({"labels": b""}, "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", NPZ_BOMBS)
def test_an_npz_bomb_is_refused_before_it_unpacks(case, tmp_path):
    pytest.importorskip("PIL.Image")
    change, message = NPZ_BOMBS[case]
    write_cifar(tmp_path)
    path, members = tmp_path / "train.npz", {}
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    members |= {f"{key}.npy": content for key, content in change.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        for name, content in members.items():
            bomb.writestr(name, content)
    del members, change
    tracemalloc.start()
    with pytest.raises(DataError, match=message) as error:
        load("cifar10", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(error.value)
    assert peak < 20e6, f"{peak / 1e6:.0f} MB"


def test_an_image_is_not_decoded_unless_its_header_has_the_right_size(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    files, _ = jpegs(12, seed=0)
    huge = bytearray(files[2])
    at = huge.find(b"\xff\xc0") + 5  # the frame header: height, then width
    huge[at : at + 4] = struct.pack(">2H", 9000, 9000)
    write_cifar(tmp_path)
    whole = archive([*files[:2], bytes(huge), *files[3:]])
    np.savez(tmp_path / "train.npz", **whole)
    decoded = []
    real = image.Image.load
    monkeypatch.setattr(image.Image, "load", lambda self: (decoded.append(self.size), real(self)))
    with pytest.raises(DataError, match=r"image 2 has shape \(9000, 9000, 3\), expected \(32, 32"):
        load("cifar10", tmp_path)
    assert set(decoded) <= {(32, 32)}
    huge[at : at + 4] = struct.pack(">2H", 65000, 65000)  # Pillow itself refuses
    np.savez(tmp_path / "train.npz", **archive([*files[:2], bytes(huge), *files[3:]]))
    with pytest.raises(DataError, match="image 2 is no whole JPEG file"):
        load("cifar10", tmp_path)
    np.savez(tmp_path / "train.npz", **archive([*files[:2], files[2] + bytes(70_000), *files[3:]]))
    with pytest.raises(DataError, match=r"image 2 has \d+ bytes, at most 65536"):
        load("cifar10", tmp_path)
