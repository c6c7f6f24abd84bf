"""Hugging Face datasets: data sets in its layout, as the hub gives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lrmanifold.experiments import data
from lrmanifold.experiments.data import DataError

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

NAMES = [f"class {i}" for i in range(10)]


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder, shape=(28, 28), image="image", label="label", names=NAMES, splits=(20, 10)):
    """A data set of random images in parquet files; returns the pixels by split."""
    rng, pixels = np.random.default_rng(0), {}
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})
    folder.mkdir(parents=True)
    for split, count in zip(("train", "test"), splits, strict=False):
        pixels[split] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        rows = {
            image: [Image.fromarray(x) for x in pixels[split]],
            label: [i % len(names) for i in range(count)],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return pixels


@pytest.mark.parametrize(
    ("name", "shape", "image"), [("mnist", (28, 28), "image"), ("cifar10", (32, 32, 3), "img")]
)
def test_pixels_and_labels_come_over(tmp_path, name, shape, image):
    pixels = write(tmp_path / "set", shape, image)
    found = data.load(name, f"hf:{tmp_path / 'set'}")
    assert found.class_names == tuple(NAMES)
    for x, y, split in (
        (found.train_x, found.train_y, "train"),
        (found.test_x, found.test_y, "test"),
    ):
        expected = torch.from_numpy(pixels[split]).float() / 255
        expected = expected[:, None] if len(shape) == 2 else expected.movedim(-1, 1)
        assert torch.equal(x, expected)
        assert y.dtype == torch.int64
        assert y.tolist() == [i % 10 for i in range(len(x))]
    assert "Hugging Face" in found.note


def test_the_environment_variable_names_it_too(tmp_path, monkeypatch):
    write(tmp_path / "set")
    monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, f"hf:{tmp_path / 'set'}")
    assert len(data.load("fashion-mnist").train_x) == 20
    assert len(data.load("digits").train_x) > 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shape": (8, 8)}, r"train image 0 has shape \(8, 8\), expected \(28, 28\)"),
        ({"image": "picture"}, "must have a column image or img"),
        ({"label": "digit"}, "must have a column label or labels"),
        ({"names": NAMES[:3]}, "ClassLabel of 10 classes"),
        ({"splits": (20,)}, "no split 'test' could be loaded"),
    ],
)
def test_what_is_something_else_is_refused(tmp_path, options, words):
    write(tmp_path / "set", **options)
    with pytest.raises(DataError, match=words):
        data.load("mnist", f"hf:{tmp_path / 'set'}")


def test_an_image_that_is_huge_is_not_decoded(tmp_path, monkeypatch):
    write(tmp_path / "set", shape=(1000, 1000), splits=(1, 1))
    real, sizes = Image.Image.load, []
    monkeypatch.setattr(Image.Image, "load", lambda self: (sizes.append(self.size), real(self)))
    with pytest.raises(DataError, match=r"image 0 has shape \(1000, 1000\)"):
        data.load("mnist", f"hf:{tmp_path / 'set'}")
    assert not sizes


def test_digits_and_folders_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="serves mnist, fashion-mnist, cifar10, not 'digits'"):
        data.load("digits", "hf:")
    with pytest.raises(DataError, match="could be loaded"):
        data.load("mnist", f"hf:{tmp_path / 'nowhere'}")
