"""The digits of scikit-learn, splits and batches of any data set, and the networks."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrmanifold.experiments import data, models
from lrmanifold.experiments.data import DataError, batches, load, validation_split

# ---------------------------------------------------------------------------------------- digits


def test_digits_are_all_there_split_by_class_and_the_same_every_time():
    sklearn = pytest.importorskip("sklearn.datasets")
    digits, again = load("digits"), load("digits")
    assert torch.equal(digits.train_x, again.train_x)
    assert torch.equal(digits.test_y, again.test_y)
    assert digits.image_shape == (1, 8, 8)
    assert (digits.train_x.min(), digits.train_x.max()) == (0, 1)
    raw = sklearn.load_digits()
    for label in range(10):
        images = torch.from_numpy(raw.images[raw.target == label]).float()[:, None] / 16
        is_test = torch.arange(len(images)) % 5 == 4
        assert torch.equal(digits.test_x[digits.test_y == label], images[is_test])
        assert torch.equal(digits.train_x[digits.train_y == label], images[~is_test])
    assert len(digits.train_y) + len(digits.test_y) == len(raw.target) == 1797


def test_digits_tell_what_to_install_and_take_no_root(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="root must be None"):
        load("digits", tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'lrmanifold\[demo\]'"):
        load("digits")


# --------------------------------------------------------------------------- splits and batches


def tiny(count=60, classes=3):
    """Every image carries its own number, so that it can be told apart."""
    x = torch.arange(count).float().view(-1, 1, 1, 1) / count * torch.ones(1, 2, 4, 4)
    y = torch.arange(count) % classes
    names = tuple(map(str, range(classes)))
    return data._dataset("tiny", (x, y), (x[:5] + 2, y[:5]), names, "A note.")


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(0, 2**40))
def test_a_validation_split_is_a_stratified_partition_of_the_training_part(fraction, seed):
    whole = tiny()
    split, again = validation_split(whole, fraction, seed), validation_split(whole, fraction, seed)
    both = torch.cat([split.train_x, split.test_x])
    assert torch.equal(both.flatten(1)[:, 0].sort().values, whole.train_x[:, 0, 0, 0])
    held_out = min(max(round(fraction * 20), 1), 19)
    assert split.test_y.bincount().tolist() == [held_out] * 3
    for x, y in ((split.train_x, split.train_y), (split.test_x, split.test_y)):
        assert torch.equal((x[:, 0, 0, 0] * 60).round().long() % 3, y)
    assert torch.equal(split.test_x, again.test_x)
    assert split.mean == pytest.approx(tuple(split.train_x.mean((0, 2, 3)).tolist()), rel=1e-5)
    assert "A note. test part = " in split.note


def test_validation_splits_differ_by_seed_and_lie_on_the_images_device(device):
    whole = tiny()
    first, second = (validation_split(whole, 0.5, seed).test_x for seed in (0, 1))
    assert not torch.equal(first, second)
    moved = data.dataclasses.replace(
        whole, train_x=whole.train_x.to(device), train_y=whole.train_y.to(device)
    )
    assert torch.equal(validation_split(moved, 0.5, 0).test_x.cpu(), first)
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=r"fraction must be a finite number in \(0, 1\)"):
            validation_split(whole, fraction, 0)
    with pytest.raises(ValueError, match="class 2 has 1 training images"):
        validation_split(tiny(count=5), 0.5, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(1, 60), st.integers(0, 2**40), st.booleans())
def test_batches_go_once_through_everything_and_keep_pairs(count, size, seed, shuffle):
    x = torch.arange(count).float().view(-1, 1)
    y = torch.arange(count) * 3
    generator = torch.Generator().manual_seed(seed)
    found = list(batches(x, y, size, generator=generator, shuffle=shuffle))
    assert [len(a) for a, _ in found if len(a)] == [size] * (count // size) + (
        [count % size] if count % size else []
    )
    if count:
        joined_x, joined_y = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert torch.equal(joined_x[:, 0].long() * 3, joined_y)
        assert torch.equal(joined_y.sort().values, y)
        assert shuffle or torch.equal(joined_y, y)


def test_batches_repeat_with_their_generator_and_differ_between_epochs(device):
    x = torch.arange(40, device=device)

    def epochs(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.cat([a for a, _ in batches(x, x, 7, generator=generator)]) for _ in range(2)]

    before = torch.get_rng_state()
    one, same, other = epochs(1), epochs(1), epochs(2)
    assert torch.equal(before, torch.get_rng_state())
    assert one[0].device.type == x.device.type
    assert torch.equal(torch.cat(one), torch.cat(same))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


def test_wrong_batches_are_refused_at_once():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="equally long, got 3 and 2"):
        batches(x, x[:2], 1)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, got 0"):
        batches(x, x, 0)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [3, 4, 10**30])
def test_a_batch_of_more_than_there_are_is_all_of_them(size, shuffle):
    x = torch.arange(3)
    ((found, _),) = batches(x, x, size, shuffle=shuffle)
    assert torch.equal(found.sort().values, x)


# ---------------------------------------------------------------------------------------- models


def test_lenet5_has_the_papers_layers(device):
    net = models.lenet5().to(device)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if p.ndim > 1}
    assert shapes == {
        "conv1.weight": (20, 1, 5, 5),
        "conv2.weight": (50, 20, 5, 5),
        "fc1.weight": (500, 800),
        "fc2.weight": (10, 500),
    }
    assert sum(p.numel() for p in net.parameters()) == 431_080
    assert sum(isinstance(m, nn.LeakyReLU) for m in net) == 3
    assert net(torch.zeros(2, 1, 28, 28, device=device)).shape == (2, 10)


@pytest.mark.parametrize("size", [16, 17, 28, 32, 33])
def test_lenet5_fits_every_image_from_16_pixels(size):
    assert models.lenet5(3, 7, size)(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_models_are_built_for_their_data_and_refuse_what_does_not_fit():
    colour = tiny()
    net = models.build("mlp", colour)
    assert [name for name, _ in net.named_children()] == [
        "flatten",
        "fc1",
        "act1",
        "fc2",
        "act2",
        "fc3",
    ]
    assert net(colour.train_x).shape == (60, 3)
    assert models.mlp(4, 2, hidden=())(torch.zeros(1, 4)).shape == (1, 2)
    with pytest.raises(ValueError, match=r"at least 16 x 16.*image_size=4"):
        models.build("lenet5", colour)
    with pytest.raises(ValueError, match=r"at least 16 x 16.*image_size=15"):
        models.lenet5(image_size=15)
    with pytest.raises(ValueError, match="square images, got 4 x 3"):
        models.build("lenet5", data.dataclasses.replace(colour, train_x=colour.train_x[..., :3]))
    with pytest.raises(ValueError, match=r"\('mlp', 'mlp-maxmin', 'lenet5', 'plain'\), got 'vgg'"):
        models.build("vgg", colour)
    with pytest.raises(ValueError, match=r"hidden\[0\] must be an integer >= 1, got 0"):
        models.mlp(4, 2, hidden=(0,))
