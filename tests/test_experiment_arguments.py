"""Wrong arguments of the experiments' functions are refused by name."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

import lrmanifold as lrm
from lrmanifold.experiments import data, methods, models, runs, training
from lrmanifold.experiments.methods import Method
from lrmanifold.experiments.training import Settings

NAN = float("nan")
WRONG = [None, 2.5, NAN, b"x", [], {}, object(), nn.Linear, torch.ones(2), lambda: 0, True]
DIGITS = data.load("digits")
SETTINGS = Settings(epochs=1)


def dense() -> nn.Module:
    return models.mlp(64, 10)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


CALLS = {
    "name": data.load,
    "root": lambda value: data.load("mnist", value),
    "x": lambda value: data.batches(value, DIGITS.train_y, 2),
    "batch_size": lambda value: data.batches(DIGITS.train_x, DIGITS.train_y, value),
    "shuffle": lambda value: data.batches(DIGITS.train_x, DIGITS.train_y, 2, shuffle=value),
    "dataset": lambda value: data.validation_split(value, 0.1, 0),
    "fraction": lambda value: data.validation_split(DIGITS, value, 0),
    "seed": lambda value: data.validation_split(DIGITS, 0.1, value),
    "in_features": lambda value: models.mlp(value, 10),
    "hidden": lambda value: models.mlp(4, 10, value),
    "image_size": lambda value: models.lenet5(1, 10, value),
    "path": runs.load_model,
    "folder": runs.load_results,
    "epochs": lambda value: Settings(epochs=value),
    "lr": lambda value: Settings(lr=value),
    "momentum": lambda value: Settings(momentum=value),
    "method": lambda value: methods.train(value, dense, DIGITS, 4, SETTINGS),
    "build": lambda value: methods.train(Method("d", "dense"), value, DIGITS, 4, SETTINGS),
    "model": lambda value: training.fit(value, sgd(dense()), DIGITS, SETTINGS),
    "optimizer": lambda value: training.fit(dense(), value, DIGITS, SETTINGS),
    "data": lambda value: training.fit(dense(), sgd(dense()), value, SETTINGS),
    "settings": lambda value: training.fit(dense(), sgd(dense()), DIGITS, value),
}
# What is right after all.
RIGHT = {
    "shuffle": (bool,),
    "hidden": (list,),
    "lr": (float,),
    "build": (type, type(lambda: 0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_value_is_refused_by_the_name_of_its_argument(name):
    for value in WRONG:
        if value is None and name == "root":
            continue
        if isinstance(value, RIGHT.get(name, ())) and value is not NAN:
            continue
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.* must be"):
            CALLS[name](value)


def test_numbers_of_numpy_are_taken_and_kept_as_pythons_own():
    settings = Settings(np.int64(2), np.int32(4), np.float32(0.5), np.float64(0.25), np.uint8(3))
    assert settings == Settings(2, 4, 0.5, 0.25, 3)
    kinds = [type(x) for x in vars(settings).values()]
    assert kinds == [type(x) for x in vars(Settings()).values()]
    assert len(list(data.batches(torch.ones(4), torch.ones(4), np.int64(2)))) == 2


DAMAGES = {
    "bytes": ("train_x", lambda x: (255 * x).byte(), "train_x must be a real floating point"),
    "0..255": ("train_x", lambda x: 255 * x, r"train_x must be images in \[0, 1\], got .* 255\]"),
    "NaN": ("train_x", lambda x: x * NAN, r"train_x must be images in \[0, 1\], got .*nan"),
    "no channels": ("train_x", lambda x: x[:, 0], r"train_x must be a tensor of shape \(\*, \*,"),
    "no images": ("train_x", lambda x: x[:0], r"train_x must hold at least one image, got .*\(0,"),
    "too few": ("train_y", lambda y: y[:-1], r"train_y must be a tensor of shape \(1442,\), got"),
    "above": ("train_y", lambda y: y + 1, r"train_y must be classes in 0..9, got 1..10"),
    "ignored": (
        "train_y",
        lambda y: y.where(y > 0, -100),
        r"train_y must be classes in 0..9, got -100..9",
    ),
    "no spread": ("std", lambda _: (0.0,), r"std\[0\] must be a finite number > 0, got 0.0"),
    "no mean": ("mean", lambda _: (NAN,), r"mean\[0\] must be a finite number, got nan"),
    "colours": ("mean", lambda m: 3 * m, "mean must be 1 finite numbers"),
    "shares": ("train_y", lambda y: y.float(), "train_y must be a tensor of dtype int64"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_data_that_contradict_themselves_are_refused_before_the_training(damage, device):
    part, change, words = DAMAGES[damage]
    value = change(getattr(DIGITS, part))
    value = value.to(device) if isinstance(value, torch.Tensor) else value
    images = dataclasses.replace(DIGITS, **{part: value})
    model = dense().to(device)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises((TypeError, ValueError), match=f"data.{words}"):
        training.fit(model, sgd(model), images, SETTINGS)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with pytest.raises((TypeError, ValueError), match=words):
        methods.train(Method("d", "dense"), dense, images, 4, SETTINGS)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = dense()

    def forward(self, x):
        return self.network(x), x


def test_a_model_that_cannot_be_trained_is_named():
    model = Pair()
    with pytest.raises(TypeError, match=r"model must return a tensor of logits .* class tuple"):
        training.fit(model, sgd(model), DIGITS, SETTINGS)
    with pytest.raises(ValueError, match=r"model must have parameters, got .* Flatten without any"):
        training.fit(nn.Flatten(), sgd(model), DIGITS, SETTINGS)


def test_an_optimizer_of_weights_that_the_model_no_longer_has_is_refused():
    model = dense()
    before = sgd(model)
    lrm.factorize(model, rank=4, exclude="fc3")
    for optimizer, name in ((before, r"fc1\.weight"), (sgd(dense()), r"fc1\.weight")):
        with pytest.raises(ValueError, match=rf"optimizer must hold .* place of '{name}', .*"):
            training.fit(model, optimizer, DIGITS, SETTINGS)
    # on purpose: a part of the model, or an objective with weights of its own
    images = dataclasses.replace(DIGITS, train_x=DIGITS.train_x[:8], train_y=DIGITS.train_y[:8])
    training.fit(model, sgd(model.fc3), images, SETTINGS)
    model = dense()
    optimizer = sgd(nn.ModuleList((model, nn.Linear(2, 2))))
    training.fit(model, optimizer, images, SETTINGS)
