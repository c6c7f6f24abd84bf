"""Every door through which a weight enters a layer: what comes in is a point, or is refused."""

from __future__ import annotations

import copy

import geoopt
import pytest
import torch
from layer_cases import BAD, LAYERS, assert_whole, ill_conditioned
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lrmanifold as lrm
from lrmanifold import GeometryError, checkpoint
from lrmanifold.nn import LowRankConv2d, LowRankLinear
from lrmanifold.optim import CondLR


@pytest.fixture(params=list(LAYERS))
def layer(request):
    return LAYERS[request.param]()


DOORS = {
    "setattr": lambda layer, value: setattr(layer, "weight", value),
    "register_parameter": lambda layer, value: layer.register_parameter("weight", value),
}


@pytest.fixture(params=list(DOORS))
def door(request):
    return DOORS[request.param]


def refused(layer, door, value, match="weight must be") -> None:
    before = layer.weight
    with pytest.raises(GeometryError, match=match):
        door(layer, value)
    assert layer.weight is before
    assert_whole(layer)


def point_of(layer) -> Tensor:
    shape = layer.weight.shape
    return layer.manifold.random(*shape).as_subclass(Tensor).clone()


def test_a_good_plain_parameter_is_taken_itself(layer, door):
    p = nn.Parameter(point_of(layer), requires_grad=False)
    door(layer, p)
    assert layer.weight is p
    assert not p.requires_grad
    assert_whole(layer)


def test_an_optimizer_over_the_given_parameter_moves_the_layer(layer, door):
    p = nn.Parameter(point_of(layer))
    optimizer = CondLR([p], lr=0.1)
    door(layer, p)
    layer.dense_weight().square().sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, layer.weight.detach())
    assert_whole(layer)


def test_a_parameter_on_an_equal_manifold_is_taken_itself_with_it(layer, door):
    M = copy.deepcopy(layer.manifold)
    p = geoopt.ManifoldParameter(point_of(layer), manifold=M)
    door(layer, p)
    assert layer.weight is p
    assert layer.manifold is p.manifold is M
    assert_whole(layer)


def test_geoopts_default_manifold_is_no_manifold(layer, door):
    p = geoopt.ManifoldParameter(point_of(layer))
    assert isinstance(p.manifold, geoopt.Euclidean)
    door(layer, p)
    assert layer.weight is p
    assert_whole(layer)


@pytest.mark.parametrize("spoil", [*BAD, torch.randn_like, torch.zeros_like])
def test_bad_values_are_refused(layer, door, spoil):
    refused(layer, door, nn.Parameter(spoil(point_of(layer))))


def test_cores_beyond_the_bound_are_refused(door):
    layer = LowRankLinear(7, 9, 3, tau=0.1)
    value = nn.Parameter(ill_conditioned(point_of(layer)))
    refused(layer, door, value, "core S is not well-conditioned")


@pytest.mark.parametrize("value", [None, "tensor", "buffer", 3.0])
def test_what_is_no_parameter_is_refused(layer, door, value):
    if value == "tensor":
        value = point_of(layer)
    elif value == "buffer":
        value = nn.Buffer(point_of(layer))
    refused(layer, door, value)


def test_parameters_of_another_manifold_are_refused(door):
    layer = LowRankLinear(7, 9, 3, tau=0.5)
    X = lrm.WellConditioned(9, 7, 3, tau=0.0).random().as_subclass(Tensor)
    others = [
        lrm.FixedRank(9, 7, 3),
        lrm.WellConditioned(9, 7, 3, tau=0.1),
        lrm.WellConditioned(9, 7, 3, tau=0.5, centre="mean"),
        lrm.WellConditioned(9, 7, 3, tau=0.5, retraction="svd"),
        lrm.WellConditioned(9, 7, 3, tau=0.5, gradient="probe"),
    ]
    for M in others:
        refused(layer, door, geoopt.ManifoldParameter(X.clone(), manifold=M), "weight must be on")


def test_groups_of_another_number_are_refused(door):
    layer, other = LowRankConv2d(4, 6, 2, 2, groups=2), LowRankConv2d(6, 9, 2, 2, groups=3)
    assert layer.weight.shape[1:] == other.weight.shape[1:]
    refused(layer, door, nn.Parameter(other.weight.detach().clone()), "its shape must be")


def test_tied_layers_stay_tied_through_conversions_and_move_together():
    a, b = LowRankLinear(6, 6, 2), LowRankLinear(6, 6, 2)
    b.weight = a.weight
    model = nn.ModuleList([a, b])
    assert len([n for n, _ in model.named_parameters() if "weight" in n]) == 1
    model.to(torch.float64)
    assert a.weight is b.weight
    model.load_state_dict(copy.deepcopy(model).state_dict())
    assert a.weight is b.weight
    CondLR(model.parameters(), lr=0.1)
    assert_whole(a)
    assert_whole(b)


@pytest.mark.parametrize(
    "parametrize",
    [
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        nn.utils.spectral_norm,
        nn.utils.weight_norm,
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        lambda m: delattr(m, "weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_parametrizations_of_the_packed_factors_are_refused(parametrize):
    layer = LowRankLinear(7, 9, 3)
    # geoopt's parameters make torch itself refuse some of them.
    with pytest.raises(RuntimeError, match=r"weight|Creating a Parameter"):
        parametrize(layer)


def test_buffers_and_biases_are_set_as_usual(layer):
    layer.bias = nn.Parameter(torch.zeros_like(layer.bias))
    layer.register_buffer("mask", torch.ones(3))
    layer.note = "anything"
    assert_whole(layer)


def test_replicas_of_data_parallel_hold_plain_tensors(layer):
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight * 1.0, layer.bias * 1.0
    torch.testing.assert_close(replica.dense_weight(), layer.dense_weight())
    replica.dense_weight().square().sum().backward()
    assert layer.weight.grad is not None
    assert_whole(layer)


# -- averages of weights


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)])
def test_averaged_factors_are_refused_wherever_they_are_used(average, tmp_path):
    """The mean of packed factors is not the mean of the matrices, and off the manifold."""
    torch.manual_seed(0)
    model = nn.Sequential(LowRankLinear(7, 9, 3, tau=0.1))
    averaged = AveragedModel(model, multi_avg_fn=average)
    averaged.update_parameters(model)
    assert_whole(averaged.module[0])  # the first one is a copy
    far = nn.Sequential(LowRankLinear(7, 9, 3, tau=0.1))
    averaged.update_parameters(far)
    mixed = averaged.module[0]
    assert isinstance(mixed.weight, geoopt.ManifoldParameter)
    with pytest.raises(RuntimeError, match=r"0\.weight is not a point of.*retracting_average"):
        model.load_state_dict(averaged.module.state_dict())
    with pytest.raises(checkpoint.CheckpointError, match=r"retracting_average; to bring it back"):
        checkpoint.save(tmp_path / "average.pt", averaged.module)
    optimizer = CondLR(averaged.parameters(), lr=0.1)
    for p in averaged.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(GeometryError, match="is not on its manifold"):
        optimizer.step()
    with torch.no_grad():
        mixed.weight.copy_(mixed.manifold.projx(mixed.weight))
    assert_whole(mixed)
    model.load_state_dict(averaged.module.state_dict())


def test_averaging_over_small_steps_needs_a_projection_only_at_the_end():
    torch.manual_seed(0)
    layer = LowRankLinear(7, 9, 3, tau=0.1)
    averaged = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = CondLR(layer.parameters(), lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        layer(torch.randn(16, 7)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(layer)
    mixed = averaged.module
    W = mixed.dense_weight().detach()
    with torch.no_grad():
        mixed.weight.copy_(mixed.manifold.projx(mixed.weight))
    assert_whole(mixed)
    torch.testing.assert_close(mixed.dense_weight().detach(), W, rtol=0, atol=2e-2)
