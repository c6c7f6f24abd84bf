"""What a caller of an attack gets wrong is named; what he may do works."""

from __future__ import annotations

import math

import pytest
import torch
from small_nets import convnet, images

from lrmanifold.robustness import accuracy_under_attack, fgsm, margin_loss, worst_case

MEAN, STD = (0.4, 0.6), (0.2, 0.5)


def attacked(device, **change):
    net = convnet(device, torch.float32)
    x, y = images(device, dtype=torch.float32)
    given = {"model": net, "x": x, "y": y, "eps": 0.1} | {
        name: make(net) if callable(make) else make for name, make in change.items()
    }
    return fgsm(**given)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": lambda net: lambda z: net(z.detach())}, ValueError, "depend differentiably"),
        ({"model": lambda net: lambda z: net(z)[:, :1]}, ValueError, r"cat\(\(-z, z\), 1\) / 2"),
        ({"mean": "a", "std": 1.0}, TypeError, "mean and std must be numbers, got mean='a'"),
        ({"loss": lambda _: lambda z, y: 1.0}, TypeError, "loss must return a tensor.*got 1.0"),
        ({"loss": lambda _: lambda z, y: None}, TypeError, "loss must return a tensor.*got None"),
    ],
)
def test_what_a_caller_gets_wrong_is_named(change, kind, message, device):
    with pytest.raises(kind, match=message):
        attacked(device, **change)


def test_an_attack_of_ones_own_must_return_images(device):
    net = convnet(device)
    data = images(device)
    for wrong in (lambda *_: None, lambda _, x, y, eps: x[:1]):
        with pytest.raises(TypeError, match="attack must return images of shape"):
            accuracy_under_attack(net, data, wrong, [0.1])
    with pytest.raises(ValueError, match="attack must return finite images"):
        accuracy_under_attack(net, data, lambda _, x, y, eps: x * math.nan, [0.1])
    x, y = data
    x = x.index_fill(0, torch.tensor([0], device=device), math.nan)
    with pytest.raises(ValueError, match="x must be finite, got NaN"):
        accuracy_under_attack(net, (x, y), fgsm, [0.0])


def test_normalisation_may_be_made_in_inference_mode(device):
    net = convnet(device)
    x, y = images(device)
    with torch.inference_mode():
        mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    expected = fgsm(net, x, y, 0.1, mean=MEAN, std=STD)
    torch.testing.assert_close(fgsm(net, x, y, 0.1, mean=mean, std=std), expected)


def test_a_model_that_writes_into_its_input_does_not_change_the_images(device):
    torch.manual_seed(0)
    inner = torch.nn.Linear(16, 5).to(device)

    def model(z):
        z.sub_(0.5).mul_(4)
        return inner(z.flatten(1))

    x = torch.rand(40, 1, 4, 4).to(device)
    y = model(x.clone()).argmax(1)
    keep = x.clone()
    assert accuracy_under_attack(model, (x, y), fgsm, [0.0, 0.01])[0.0] == 1.0
    found = worst_case(model, (x, y), 1e-6, attacks=("pgd", "square"), queries=20, steps=2)
    assert found.clean == 1.0
    assert torch.equal(x, keep)


def test_the_margin_loss_wants_a_class_for_each_row(device):
    z = torch.zeros(3, 4, device=device)
    with pytest.raises(ValueError, match="y shape"):
        margin_loss(z, torch.tensor([1], device=device))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32], ids=str)
def test_classes_come_in_any_dtype_of_integers(dtype):
    """uint8 holds 0..255, so that 300 classes, the bound, have no place in it."""
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 300)
    x = torch.rand(40, 8)
    y = net(x).argmax(1)
    x, y = x[y < 256], y[y < 256]
    expected = accuracy_under_attack(net, (x, y), fgsm, [0.0, 0.02])
    assert accuracy_under_attack(net, (x, y.to(dtype)), fgsm, [0.0, 0.02]) == expected
