"""Two factors and orthogonal matrices: which layers, with which options; what is refused."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.factors import TwoFactors, two_factors
from lrmanifold.experiments.methods import Method, train
from lrmanifold.experiments.models import mlp
from lrmanifold.experiments.orthogonal import orthogonalize, plain_layers
from lrmanifold.experiments.training import Normalized, Settings

SETTINGS = Settings(epochs=2, batch_size=16, lr=0.1, seed=3)
build = functools.partial(mlp, 16, 3, (20, 20))


@pytest.fixture(scope="module")
def noise() -> Dataset:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(96, 1, 4, 4, generator=g), torch.arange(96) % 3
    names = ("a", "b", "c")
    return Dataset("noise", x[:72], y[:72], x[72:], y[72:], 3, names, (0.5,), (0.25,))


@pytest.mark.parametrize(
    "wrong",
    [
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 8, 3, dilation=2),
        nn.MultiheadAttention(64, 4),
        nn.Embedding(50, 40),
    ],
    ids=lambda m: type(m).__name__,
)
def test_two_factors_refuse_other_layers_before_anything_changes(wrong):
    model = nn.ModuleDict({"fine": nn.Linear(40, 40), "wrong": wrong})
    with pytest.raises(ValueError, match=rf"got {type(wrong).__name__}.* at 'wrong'"):
        two_factors(model, 1, include=("fine", "wrong"))
    assert type(model["fine"]) is nn.Linear
    two_factors(model, 1, exclude="wrong*")
    assert isinstance(model["fine"], TwoFactors)


def test_two_factors_of_a_bare_layer_and_of_one_used_twice():
    layer, x = nn.Linear(40, 30), torch.randn(2, 40)
    found = two_factors(copy.deepcopy(layer), 4)
    assert isinstance(found, TwoFactors)
    torch.testing.assert_close(found(x), two_factors(nn.Sequential(layer), 4)(x))
    twice = nn.Linear(40, 40)
    model = two_factors(nn.Sequential(twice, nn.ReLU(), twice), 4)
    assert isinstance(model[0], TwoFactors)
    assert model[0] is model[2]


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": (2, 1), "stride": 2},
        {"padding": "same", "dilation": (1, 3), "kernel_size": (2, 4)},
        {"padding": "valid"},
    ],
    ids=["numbers", "same", "valid"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_orthogonal_convolutions_keep_every_option(mode, options):
    options = {"kernel_size": 3, "padding_mode": mode, **options}
    plain = nn.Conv2d(3, 8, **options).double()
    network = orthogonalize(nn.Sequential(copy.deepcopy(plain), nn.Linear(4, 2).double()))
    with torch.no_grad():
        plain.weight.copy_(network[0].matrix.weight.reshape(plain.weight.shape))
    x = torch.randn(2, 3, 11, 10, dtype=torch.float64)
    torch.testing.assert_close(network[0](x), plain(x))
    again = plain_layers(copy.deepcopy(network))[0]
    assert type(again) is nn.Conv2d
    assert torch.equal(again(x), network[0](x))  # and the original is as it was


def shared():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return nn.Sequential(nn.Linear(4, 4), a, b)


def once_before():
    return orthogonalize(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 2), nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Linear(4, 4), "two linear or 2-d convolution layers or more.* got 1"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 8, 3, groups=2), nn.Linear(2, 2)),
         "layer '1' cannot be made orthogonal: it is one with 2 groups"),
        (shared, "layer '2' cannot be made orthogonal: it is one with the weight of '1'"),
        (once_before, "layer '0' .* parametrized already"),
        (lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), "run the network once"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_orthogonal_is_refused_before_anything_changes(make, why):
    network = make()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=why):
        orthogonalize(network)
    for key, value in network.state_dict().items():
        if not isinstance(value, nn.parameter.UninitializedParameter):
            assert torch.equal(value, before[key])
    with pytest.raises(TypeError, match=r"network must be a torch\.nn\.Module"):
        orthogonalize(make)


def test_a_convolution_used_twice_is_orthogonal_at_both_places():
    conv = nn.Conv2d(3, 3, 3)
    network = orthogonalize(nn.Sequential(conv, conv, nn.Linear(2, 2)))
    assert network[0] is network[1]
    assert type(network[0]) is not nn.Conv2d


@pytest.mark.parametrize("kind", ["dense", "finetuned"])
def test_a_checkpoint_may_be_named_by_a_string(kind, noise, tmp_path):
    method, name = Method(kind, kind), str(tmp_path / "run.pt")
    found = train(method, build, noise, 5, SETTINGS, exclude="fc3", checkpoint=name)
    again = train(method, build, noise, 5, SETTINGS, exclude="fc3", checkpoint=Path(name))
    assert found.history == again.history
    assert (tmp_path / "run.pt").exists()
    with pytest.raises(TypeError, match="checkpoint must be a path"):
        train(method, build, noise, 5, SETTINGS, checkpoint=3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (nn.Linear(4, 4), r"build must be a function .* got a module of class Linear: give lambda"),
        (lambda: None, r"build\(\) must be a torch\.nn\.Module, got None"),
        (None, "build must be a function"),
    ],
)
def test_what_makes_no_network_is_named(wrong, message, noise):
    with pytest.raises(TypeError, match=message):
        train(Method("dense", "dense"), wrong, noise, 5, SETTINGS)


def test_networks_in_place_of_functions_and_results_are_named(noise):
    with pytest.raises(TypeError, match="dense must be a Trained"):
        train(Method("svd", "svd"), build, noise, 5, SETTINGS, dense=build())
    with pytest.raises(TypeError, match=r"network must be a torch\.nn\.Module, got functools"):
        Normalized(build, noise)


@pytest.mark.parametrize("replace", [orthogonalize, functools.partial(two_factors, rank=2)])
def test_frozen_weights_stay_frozen(replace):
    """As in factorize: a part that somebody froze is not trained for being replaced."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(72, 20), nn.Linear(20, 9)
    )
    network[0].requires_grad_(False)
    network[3].requires_grad_(False).bias.requires_grad_(True)
    replace(network)
    kinds = [[(p.ndim, p.requires_grad) for p in layer.parameters()] for layer in network]
    assert {free for _, free in kinds[0]} == {False}
    assert {free for _, free in kinds[1] + kinds[4]} == {True}
    assert dict(kinds[3]) == {2: False, 1: True}


def test_a_trained_network_is_in_evaluation_mode(noise):
    """A look at images afterwards gives what is measured, and changes no averages."""

    def norms():
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    for kind in ("dense", "svd", "finetuned"):
        model = train(Method(kind, kind), norms, noise, 2, SETTINGS).model
        before = copy.deepcopy(model.state_dict())
        model(noise.test_x)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
