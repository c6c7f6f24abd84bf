"""param_groups: every trainable parameter once, in the group that it belongs to."""

from __future__ import annotations

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold import GeometryError
from lrmanifold.nn import LowRankConv2d, LowRankLinear
from lrmanifold.optim import CondLR, param_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = LowRankConv2d(3, 8, 3, 2)
        self.norm = nn.BatchNorm2d(8)
        self.fc = LowRankLinear(8, 6, 2, tau=None)
        self.head = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.embedding = nn.Embedding(5, 6)


def by_name(groups) -> dict[str, list[str]]:
    return {g["name"]: [n for n, _ in g["params"]] for g in groups}


def test_kinds_of_parameters_go_to_their_groups():
    assert by_name(param_groups(Net())) == {
        "manifold": ["conv.weight", "fc.weight"],
        "decay": ["head.weight", "embedding.weight"],
        "no_decay": ["scale", "conv.bias", "norm.weight", "norm.bias", "fc.bias", "head.bias"],
    }


def test_each_trainable_parameter_is_in_exactly_one_group():
    net = Net()
    net.again = net.fc
    net.embedding.weight.requires_grad_(False)
    listed = [p for g in param_groups(net) for _, p in g["params"]]
    assert len({id(p) for p in listed}) == len(listed)
    assert {id(p) for p in listed} == {id(p) for p in net.parameters() if p.requires_grad}


@given(
    lr=st.one_of(st.none(), st.floats(0.0, 1.0)),
    decay=st.one_of(st.none(), st.floats(0.0, 1.0)),
)
def test_options_reach_the_optimizer_and_biases_are_never_decayed(lr, decay):
    groups = param_groups(Net(), lr=lr, weight_decay=decay)
    optimizer = CondLR(groups, lr=0.3, weight_decay=0.7, momentum=0.5)
    for group in optimizer.param_groups:
        assert group["lr"] == (0.3 if lr is None else lr)
        expected = 0.0 if group["name"] == "no_decay" else (0.7 if decay is None else decay)
        assert group["weight_decay"] == expected
        assert group["momentum"] == 0.5


def test_groups_without_parameters_are_left_out():
    assert by_name(param_groups(nn.LayerNorm(3))) == {"no_decay": ["weight", "bias"]}
    assert by_name(param_groups(LowRankLinear(4, 3, 2, bias=False))) == {"manifold": ["weight"]}
    assert param_groups(nn.ReLU()) == []


def test_the_names_reach_error_messages():
    net = Net()
    optimizer = CondLR(param_groups(net), lr=0.1)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    del net.fc.weight.manifold
    with pytest.raises(GeometryError, match=r"'fc\.weight' was on FixedRank"):
        optimizer.step()


def test_parameters_on_manifolds_without_a_core_are_not_decayed():
    net = nn.Module()
    frame = lrm.Stiefel().random(5, 2).as_subclass(Tensor)
    net.frame = geoopt.ManifoldParameter(frame, manifold=lrm.Stiefel())
    net.plain = geoopt.ManifoldParameter(torch.ones(2, 2))  # geoopt's default: Euclidean
    groups = param_groups(net, weight_decay=0.1)
    assert by_name(groups) == {"decay": ["plain"], "no_decay": ["frame"]}
    lrm.optim.CondLR(groups, lr=0.1)  # a frame in a group with decay would be refused


@pytest.mark.parametrize("lose", ["delete", "euclidean", "plain"])
def test_a_layer_that_lost_its_manifold_raises(lose):
    net = Net()
    if lose == "delete":
        del net.fc.weight.manifold
    elif lose == "euclidean":
        net.fc.weight.manifold = geoopt.Euclidean()
    else:
        net.fc._parameters["weight"] = nn.Parameter(net.fc.weight.detach().clone())
    with pytest.raises(GeometryError, match=r"fc\.weight \(shape \(16, 2\)\) has lost its man"):
        param_groups(net)


def test_decay_acts_on_the_core_alone():
    net = Net()
    optimizer = CondLR(param_groups(net, weight_decay=0.5), lr=0.2)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = {k: v.detach().clone() for k, v in net.named_parameters()}
    W = net.fc.dense_weight().detach()
    optimizer.step()
    torch.testing.assert_close(net.fc.dense_weight().detach(), 0.9 * W)
    torch.testing.assert_close(net.fc.factors.U.detach(), before["fc.weight"][:6])
    torch.testing.assert_close(net.head.weight.detach(), 0.9 * before["head.weight"])
    for name in ("fc.bias", "norm.weight", "scale"):
        assert torch.equal(net.get_parameter(name).detach(), before[name])
