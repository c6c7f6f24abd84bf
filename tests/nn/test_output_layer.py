"""Shares, compression and energy leave the output layer dense, unless it is named."""

import pytest
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn.plan import make_plan, output_layer


def net(inputs=128, outputs=10):
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(inputs, outputs))


def ranks(**options):
    return {d.name: d.rank for d in make_plan(net(), **options).decisions}


@pytest.mark.parametrize(
    "rule",
    [{"rank": 0.25}, {"compression": 0.4}, {"energy": 0.5}, {"rank": {"*": 0.25}}],
)
def test_the_output_layer_stays_dense(rule):
    assert ranks(**rule)["2"] is None
    assert ranks(**rule)["0"] is not None
    assert "output layer" in str(make_plan(net(), **rule))
    named = ranks(**rule, include=["0", "2"], keep_larger=True)
    assert named["2"] is not None


@pytest.mark.parametrize("rule", [{"rank": 4}, {"rank": {"2": 0.4}}, {"rank": {"*": 4}}])
def test_ranks_and_names_that_are_given_are_followed(rule):
    assert ranks(**rule)["2"] == 4


@pytest.mark.parametrize(
    ("inputs", "outputs", "found"),
    [(128, 63, "2"), (128, 64, None), (4096, 1000, "2"), (2048, 1000, None), (3072, 768, None)],
)
def test_what_an_output_layer_is(inputs, outputs, found):
    assert output_layer(net(inputs, outputs)) == found


def test_a_layer_alone_and_what_is_left_of_a_second_call_are_no_output_layers():
    assert output_layer(nn.Linear(64, 10)) is None
    model = lrm.factorize(net(), rank=4)
    assert output_layer(model) is None


def test_the_rank_may_be_given_by_position():
    assert lrm.factorize(net(), 4)[0].rank == 4
