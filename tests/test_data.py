"""Data files are read whole and right, or refused by name; splits and batches repeat."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmanifold.experiments import _bounded, data
from lrmanifold.experiments.data import DataError, load

TRAIN_X, TRAIN_Y = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_X, TEST_Y = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
VARIABLE = data.ENVIRONMENT_VARIABLE


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch, tmp_path):
    """No test finds data that this machine happens to have, unless it asks for it."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_DIRS", str(tmp_path / "share"))


# ------------------------------------------------------------------------- IDX files, written here


def idx(array):
    """The bytes of an IDX file of unsigned bytes, by the format's description."""
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def arrays(train=30, test=20, seed=0):
    rng = np.random.default_rng(seed)
    return {
        TRAIN_X: rng.integers(0, 256, (train, 28, 28)),
        TRAIN_Y: rng.permutation(np.arange(train) % 10),
        TEST_X: rng.integers(0, 256, (test, 28, 28)),
        TEST_Y: rng.permutation(np.arange(test) % 10),
    }


def write(folder, files, packed=()):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else idx(content)
        if name in packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return folder


def assert_holds(dataset, files):
    for x, y, images, labels in (
        (dataset.train_x, dataset.train_y, files[TRAIN_X], files[TRAIN_Y]),
        (dataset.test_x, dataset.test_y, files[TEST_X], files[TEST_Y]),
    ):
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert x.shape == (len(images), 1, 28, 28)
        assert np.array_equal((x[:, 0].double() * 255).round().numpy(), images)
        assert torch.equal(x, (torch.from_numpy(images)[:, None].float() / 255))
        assert np.array_equal(y.numpy(), labels)


@pytest.mark.parametrize("packed", [(), (TRAIN_X, TRAIN_Y, TEST_X, TEST_Y), (TRAIN_X, TEST_Y)])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_come_back_as_they_were_written(name, packed, tmp_path):
    files = arrays()
    dataset = load(name, write(tmp_path / "d", files, packed))
    assert_holds(dataset, files)
    assert (dataset.name, dataset.classes, len(dataset.class_names)) == (name, 10, 10)
    assert dataset.image_shape == (1, 28, 28)
    pixels = files[TRAIN_X] / 255
    assert dataset.mean == pytest.approx((pixels.mean(),), rel=1e-6)
    assert dataset.std == pytest.approx((pixels.std(),), rel=1e-6)


@pytest.mark.parametrize("below", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("by", ["root", "environment"])
def test_the_folder_is_found_itself_or_from_above(below, by, tmp_path, monkeypatch):
    files = arrays()
    write(tmp_path / "d" / below, files)
    if by == "environment":
        monkeypatch.setenv(VARIABLE, str(tmp_path / "d"))
    assert_holds(load("mnist", str(tmp_path / "d") if by == "root" else None), files)


def test_root_goes_before_the_environment_and_that_before_the_system(tmp_path, monkeypatch):
    places = {key: arrays(seed=seed) for seed, key in enumerate(("share", "variable", "root"))}
    write(tmp_path / "share" / "datasets" / "fashion-mnist", places["share"])
    assert_holds(load("fashion-mnist"), places["share"])
    with pytest.raises(DataError, match="mnist was not found"):
        load("mnist")
    write(tmp_path / "v" / "fashion-mnist", places["variable"])
    monkeypatch.setenv(VARIABLE, str(tmp_path / "v"))
    assert_holds(load("fashion-mnist"), places["variable"])
    write(tmp_path / "r" / "fashion-mnist", places["root"])
    assert_holds(load("fashion-mnist", tmp_path / "r"), places["root"])


def test_the_data_sets_own_folder_goes_before_its_parent(tmp_path):
    own, other = arrays(seed=1), arrays(seed=2)
    write(tmp_path, other)
    write(tmp_path / "mnist", own)
    assert_holds(load("mnist", tmp_path), own)


# ----------------------------------------------------------------------------- broken IDX files

BROKEN = {
    "empty": (TRAIN_X, lambda raw, _: b"", "truncated, 0 bytes"),
    "in the magic number": (TRAIN_Y, lambda raw, _: raw[:3], "truncated, 3 bytes"),
    "in the header": (TEST_X, lambda raw, _: raw[:11], "truncated, 11 bytes.* has 16"),
    "in the data": (TEST_Y, lambda raw, _: raw[:-1], "truncated, 27 bytes unpacked, expected 28"),
    "too long": (TRAIN_X, lambda raw, _: raw + b"\0", "too long"),
    "labels as images": (TRAIN_X, lambda raw, a: idx(a[TRAIN_Y]), "0x00000801, expected 0x0+803"),
    "images as labels": (TEST_Y, lambda raw, a: idx(a[TEST_X]), "0x00000803, expected 0x0+801"),
    "a picture": (TEST_X, lambda raw, _: b"\x89PNG\r\n\x1a\n" + raw, "0x89504e47, expected"),
    "signed bytes": (TRAIN_X, lambda raw, _: raw[:2] + b"\x09" + raw[3:], "expected 0x00000803"),
    "other size": (TEST_X, lambda raw, a: idx(a[TEST_X][:, :27]), r"\(27, 28\), expected .*28, 28"),
    "no image": (TRAIN_X, lambda raw, a: idx(a[TRAIN_X][:0]), "holds 0 items"),
    "a huge count": (TRAIN_Y, lambda raw, _: raw[:4] + b"\xff" * 4 + raw[8:], "truncated"),
    "fewer labels": (TRAIN_Y, lambda raw, a: idx(a[TRAIN_Y][:-1]), "29 labels for 30 images"),
    "fewer images": (TEST_X, lambda raw, a: idx(a[TEST_X][:-1]), "20 labels for 19 images"),
    "label 10": (TEST_Y, lambda raw, a: idx(a[TEST_Y] + 1), r"in 0\.\.9, got 1\.\.10"),
    "half a gzip": (TRAIN_X, lambda raw, _: gzip.compress(raw)[:-200], "damaged or truncated"),
    "gzip header only": (TEST_Y, lambda raw, _: gzip.compress(raw)[:5], "damaged or truncated"),
    "bad gzip data": (
        TEST_X, lambda raw, _: gzip.compress(raw)[:400] + b"?" * 400, "damaged or truncated"
    ),
    "bad gzip checksum": (
        TRAIN_X, lambda raw, _: gzip.compress(raw)[:-8] + b"12345678", "damaged or truncated"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_idx_file_is_refused_by_name(case, tmp_path):
    stem, damage, message = BROKEN[case]
    files = arrays()
    write(tmp_path, files)
    (tmp_path / stem).write_bytes(damage(idx(files[stem]), files))
    # counts that contradict each other are told at the labels
    named = stem.replace("images-idx3", "labels-idx1") if "labels for" in message else stem
    with pytest.raises(DataError, match=message) as error:
        load("mnist", tmp_path)
    assert str(tmp_path / named) in str(error.value)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.booleans(), st.sampled_from([TRAIN_X, TRAIN_Y, TEST_X, TEST_Y]))
def test_every_truncation_of_every_file_is_refused(draw, packed, stem):
    files = arrays(train=3, test=2)
    raw = gzip.compress(idx(files[stem])) if packed else idx(files[stem])
    length = draw.draw(st.integers(0, len(raw) - 1))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), files)
        (Path(folder) / stem).unlink()
        (Path(folder) / (stem + ".gz" * packed)).write_bytes(raw[:length])
        with pytest.raises(DataError, match=stem):
            load("mnist", folder)


@pytest.mark.parametrize("stem", [TRAIN_X, TRAIN_Y, TEST_X, TEST_Y])
def test_a_missing_file_among_the_four_is_named(stem, tmp_path):
    write(tmp_path, arrays(), packed=(TRAIN_X,))
    next(tmp_path.glob(f"{stem}*")).unlink()
    with pytest.raises(DataError, match=f"{stem}: missing, and so is {stem}.gz"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
def test_absent_data_tells_where_it_looked_and_what_it_needs(name, tmp_path, monkeypatch):
    needed = {"fashion-mnist": "Debian's package dataset-fashion-mnist"}.get(name, "Needed: ")
    with pytest.raises(DataError, match=f"{name} was not found.*{needed}.*{VARIABLE}"):
        load(name)
    if name != "fashion-mnist":  # which has standard places
        with pytest.raises(DataError, match="was not found: no folder was named"):
            load(name)
    with pytest.raises(DataError, match=f"looked in {tmp_path}"):
        load(name, tmp_path)
    with pytest.raises(DataError, match=r"root \(--root\) is no folder"):
        load(name, tmp_path / "nowhere")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=f"{VARIABLE} is no folder"):
        load(name)


def test_an_unknown_name_is_refused():
    with pytest.raises(
        DataError, match="'digits', 'mnist', 'fashion-mnist', 'cifar10', got 'svhn'"
    ):
        load("svhn")


def test_the_labels_of_another_data_set_or_part_are_recognised(tmp_path, monkeypatch):
    files = arrays()
    write(tmp_path, files)
    md5 = hashlib.md5(idx(files[TEST_Y])).hexdigest()
    for known in (("fashion-mnist", "test"), ("mnist", "train")):
        monkeypatch.setitem(data._IDX_LABELS, md5, known)
        with pytest.raises(
            DataError, match=f"holds the {known[1]} labels of {known[0]}, not mnist"
        ):
            load("mnist", tmp_path)


# ------------------------------------------------------------------------ the real files, if here


def shared_folder(*below):
    """LRMANIFOLD_DATA as it was at import, or ``../shared/data`` beside the repository."""
    top = REAL_DATA or Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(top).joinpath(*below)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: set {VARIABLE} to the folder that holds {below}")
    return folder


REAL_DATA = os.environ.get(VARIABLE)
REAL_SHARES = os.environ.get("XDG_DATA_DIRS") or ""


def test_the_real_mnist_is_the_original(monkeypatch):
    expected = {
        TRAIN_X: "6bbc9ace898e44ae57da46a324031adb",
        TRAIN_Y: "a25bea736e30d166cdddb491f175f624",
        TEST_X: "2646ac647ad5339dbf082846283269ea",
        TEST_Y: "27ae3e4e09519cfbb04c329615203637",
    }
    folder = shared_folder("mnist")
    for stem, md5 in expected.items():
        item = (28, 28) if "images" in stem else ()
        raw, _, _ = _bounded.read_idx(data._either(folder, stem), item)
        assert hashlib.md5(raw).hexdigest() == md5
    monkeypatch.setenv(VARIABLE, str(folder.parent))
    mnist = load("mnist")
    assert (len(mnist.train_x), len(mnist.test_x)) == (60_000, 10_000)
    assert mnist.train_y[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.mean == pytest.approx((0.1307,), abs=1e-4)
    assert mnist.std == pytest.approx((0.3081,), abs=1e-4)
    with pytest.raises(DataError, match="labels of mnist, not fashion-mnist"):
        load("fashion-mnist", folder)


def test_the_real_fashion_mnist_of_debian_is_found(monkeypatch):
    monkeypatch.setenv("XDG_DATA_DIRS", REAL_SHARES)
    try:
        fashion = load("fashion-mnist")
    except DataError as error:
        pytest.skip(f"the package dataset-fashion-mnist is not installed: {error}")
    assert (len(fashion.train_x), len(fashion.test_x)) == (60_000, 10_000)
    assert fashion.train_y.bincount().tolist() == [6000] * 10
    assert fashion.class_names[9] == "Ankle boot"
    assert fashion.mean == pytest.approx((0.2860,), abs=1e-4)


# -------------------------------------------------------------------------------------- CIFAR-10


def jpegs(count, seed):
    """JPEG files of smooth colour pictures, and the pixels Pillow decodes them to."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(seed)
    files, pixels = [], []
    for _ in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        image.fromarray(np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))).save(buffer, "JPEG")
        files.append(buffer.getvalue())
        pixels.append(np.asarray(image.open(io.BytesIO(files[-1]))))
    return files, np.stack(pixels)


NAMES = np.array(
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
)


def archive(files, **change):
    content = {
        "jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": (np.arange(len(files)) % 10).astype(np.uint8),
        "names": NAMES,
    } | change
    return {key: value for key, value in content.items() if value is not None}


def write_cifar(folder):
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": jpegs(12, seed=0), "test": jpegs(11, seed=1)}
    for part, (files, _) in parts.items():
        np.savez(folder / f"{part}.npz", **archive(files))
    return parts


@pytest.mark.parametrize("below", [".", "cifar10-jpeg", "cifar10"])
def test_cifar_images_are_decoded_to_what_pillow_sees(below, tmp_path):
    parts = write_cifar(tmp_path / below)
    cifar = load("cifar10", tmp_path)
    for x, y, part in (
        (cifar.train_x, cifar.train_y, "train"), (cifar.test_x, cifar.test_y, "test")
    ):  # fmt: skip
        pixels = parts[part][1]
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert np.array_equal(x.permute(0, 2, 3, 1).mul(255).round().numpy(), pixels)
        assert y.tolist() == [i % 10 for i in range(len(pixels))]
    assert cifar.image_shape == (3, 32, 32)
    assert cifar.class_names == tuple(NAMES)
    assert "never directly comparable with published tables" in cifar.note
    expected = (parts["train"][1] / 255).mean((0, 1, 2))
    assert cifar.mean == pytest.approx(tuple(expected), rel=1e-6)


def test_every_broken_cifar_file_is_refused_by_name(tmp_path):
    files, _ = jpegs(12, seed=0)
    image = pytest.importorskip("PIL.Image")
    grey, small = io.BytesIO(), io.BytesIO()
    image.new("L", (32, 32)).save(grey, "JPEG")
    image.new("RGB", (16, 32)).save(small, "JPEG")
    whole = archive(files)
    offsets = whole["offsets"]
    swapped = offsets.astype(np.uint64)
    swapped[[3, 4]] = swapped[[4, 3]]
    changes = [
        ({"labels": None}, r"has no array \['labels'\]"),
        ({"jpeg": whole["jpeg"].astype(np.int32)}, "jpeg must be one-dimensional"),
        ({"jpeg": whole["jpeg"][:-3]}, "offsets must be 13 increasing numbers"),
        ({"offsets": offsets[:-1]}, "offsets must be 13 increasing numbers"),
        ({"offsets": swapped}, "offsets must be 13 increasing numbers"),
        ({"labels": whole["labels"] + 1}, r"in 0\.\.9, got 1\.\.10"),
        ({"labels": whole["labels"].reshape(3, 4)}, "labels must be one-dimensional"),
        ({"labels": whole["labels"] / 2}, "labels must be one-dimensional"),
        ({"names": NAMES[:9]}, "10 class names, got 9"),
        ({"names": NAMES[::-1]}, "names .*truck.*train.npz has"),
        ({"names": NAMES.astype(object)}, "damaged"),
    ]
    for data_bytes, message in (
        (b"no picture at all", "image 2 is no whole JPEG file"),
        (files[2][: len(files[2]) // 2], "image 2 is no whole JPEG file"),
        (grey.getvalue(), r"image 2 has shape \(32, 32\)"),
        (small.getvalue(), r"image 2 has shape \(32, 16, 3\)"),
    ):
        changes.append((archive([*files[:2], data_bytes, *files[3:]]), message))
    write_cifar(tmp_path)
    path = tmp_path / "test.npz"
    for change, message in changes:
        np.savez(path, **archive(files, **change))
        with pytest.raises(DataError, match=message) as error:
            load("cifar10", tmp_path)
        assert str(path) in str(error.value)
    np.savez(path, **whole)
    good = path.read_bytes()
    npy = io.BytesIO()
    np.save(npy, NAMES)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    for raw, message in (
        (good[:-40], "no .npz archive, or truncated"),
        (b"", "no .npz archive"),
        (npy.getvalue(), "no .npz archive"),
        (bytes(flipped), "damaged"),
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=message) as error:
            load("cifar10", tmp_path)
        assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(DataError, match=r"test\.npz: missing"):
        load("cifar10", tmp_path)
