"""A layer that a function or container holds as well stays dense: the new one would not be used."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn

import lrmanifold as lrm


class Holder(nn.Module):
    def __init__(self, hold):
        super().__init__()
        self.lin, self.out = nn.Linear(12, 12), nn.Linear(12, 3)
        self.held = hold(self.lin)

    def forward(self, x):
        return self.out(self.lin(x))


@pytest.mark.parametrize(
    "hold",
    [
        lambda lin: lambda x: torch.relu(lin(x)),
        lambda lin: lambda x, lin=lin: lin(x),
        lambda lin: lambda x, *, lin=lin: lin(x),
        lambda lin: lin.forward,
        lambda lin: functools.partial(lin),
        lambda lin: functools.partial(nn.functional.relu, input=lin),
        lambda lin: types.SimpleNamespace(layer=lin),
        lambda lin: [lin],
    ],
    ids=[
        "closure",
        "default",
        "keyword-default",
        "method",
        "partial",
        "keyword",
        "namespace",
        "list",
    ],
)
def test_a_layer_that_something_else_holds_stays_dense(hold):
    model = lrm.factorize(Holder(hold), rank=3, exclude="out")
    assert type(model.lin) is nn.Linear


def test_a_variable_without_a_value_is_no_obstacle():
    def around(lin):
        held = lambda x: later(x)  # noqa: E731
        if lin is None:
            later = lin
        return held

    model = lrm.factorize(Holder(around), rank=3, exclude="out")
    assert isinstance(model.lin, lrm.nn.LowRankLinear)


def test_other_functions_do_not_matter():
    model = lrm.factorize(Holder(lambda lin: torch.relu), rank=3, exclude="out")
    assert isinstance(model.lin, lrm.nn.LowRankLinear)


def test_a_compression_that_no_layer_is_chosen_for_says_why():
    with pytest.raises(ValueError, match=r"no layer is chosen .*output"):
        lrm.factorize(nn.Sequential(nn.Linear(64, 32)), compression=0.5)


@pytest.mark.parametrize(
    "hold",
    [
        lambda lin: [lin.weight],
        lambda lin: {"decayed": [lin.weight]},
        lambda lin: functools.partial(torch.nn.functional.linear, weight=lin.weight),
        lambda lin, held=None: lambda x, weight=lin.weight: x @ weight,
    ],
    ids=["list", "dict", "partial", "default"],
)
def test_a_weight_that_something_else_holds_stays_dense(hold):
    plans = []
    model = lrm.factorize(Holder(hold), rank=3, exclude="out", summary=plans.append)
    assert type(model.lin) is nn.Linear
    (reason, _) = (d.reason for d in plans[0].decisions)
    assert reason == "Holder.held refers to its weight too, outside of the module tree"


def test_a_bias_that_something_else_holds_is_no_obstacle():
    model = lrm.factorize(Holder(lambda lin: [lin.bias]), rank=3, exclude="out")
    assert isinstance(model.lin, lrm.nn.LowRankLinear)
    assert model.held[0] is model.lin.bias


def test_a_held_low_rank_weight_and_one_of_attention_stay():
    model = Holder(lambda lin: None)
    model.lin = lrm.nn.LowRankLinear(12, 12, 3)
    model.held = [model.lin.weight]
    with pytest.warns(UserWarning, match=r"left alone lin: Holder\.held refers to its weight"):
        lrm.densify(model)
    attention = nn.Module()
    attention.part = nn.MultiheadAttention(16, 2)
    attention.held = [attention.part.in_proj_weight]
    with pytest.warns(UserWarning, match=r"q_proj: Module\.held refers to its weight"):
        lrm.factorize(attention, rank=2)
    lrm.nn.adapt(Holder(lambda lin: [lin.weight]), 2)  # the weight itself goes on to the base
