"""Two free factors of one matrix are reported as that matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lrmanifold.experiments.factors import TwoFactors, two_factors
from lrmanifold.experiments.models import lenet5, mlp
from lrmanifold.nn import LowRankConv2d
from lrmanifold.report import report

RANKS = {"conv1": 4, "conv2": 10, "fc1": 20}


def pairs_of_lenet() -> nn.Module:
    return two_factors(lenet5(), RANKS, keep_larger=True)


def product(pair: TwoFactors) -> torch.Tensor:
    thin, wide = (layer.weight.detach().flatten(1).double() for layer in pair)
    return wide @ thin


def test_a_pair_is_one_row_with_the_singular_values_of_the_product():
    model = pairs_of_lenet()
    with torch.no_grad():
        for name in RANKS:  # as after a training: no longer balanced
            model.get_submodule(name)[0].weight.mul_(3).add_(0.01)
    found = report(model)
    assert [layer.name for layer in found.layers] == [*RANKS, "fc2"]
    for layer in found.layers[:3]:
        W = product(model.get_submodule(layer.name))
        s = torch.linalg.svdvals(W)[: layer.rank]
        assert (layer.kind, layer.low_rank) == ("TwoFactors", True)
        assert (layer.rank, layer.shape) == (RANKS[layer.name], tuple(W.shape))
        assert layer.sigma_max == pytest.approx(s[0].item(), rel=1e-5)
        assert layer.sigma_min == pytest.approx(s[-1].item(), rel=1e-5)
        assert layer.cond == pytest.approx((s[0] / s[-1]).item(), rel=1e-5)
        assert (layer.tau, layer.drift, layer.note) == (None, None, "")


def test_sizes_are_shares_of_the_dense_network():
    model, dense = pairs_of_lenet(), lenet5()
    found = report(model)
    fc1 = found.layers[2]
    assert fc1.dense_weights == 500 * 800
    assert fc1.trained_weights == fc1.folded_weights == (500 + 800) * 20
    assert found.dense_parameters == sum(p.numel() for p in dense.parameters())
    assert found.trained_parameters == sum(p.numel() for p in model.parameters())
    assert found.folded_parameters == found.trained_parameters
    assert "trained (100.0%)" not in str(found)


@pytest.mark.parametrize("options", [{"stride": 3}, {"padding": 1, "padding_mode": "circular"}])
def test_the_map_of_a_pair_of_convolutions_is_that_of_the_product(options):
    dense = nn.Conv2d(3, 12, 3, **options)
    model = two_factors(nn.Sequential(dense), 5, keep_larger=True)
    whole = nn.Conv2d(3, 12, 3, **options)
    whole.weight.data = product(model[0]).float().reshape(whole.weight.shape)
    twin = nn.Sequential(LowRankConv2d.from_dense(whole, 5, tau=None))
    images = torch.ones(2, 3, 6, 6)
    ours, same = (report(x, images).layers[0].map_cond for x in (model, twin))
    assert same is not None
    assert ours == pytest.approx(same, rel=1e-4)


def test_pairs_that_are_the_model_broken_or_changed():
    pair = two_factors(nn.Sequential(nn.Linear(30, 20)), 4)[0]
    assert [layer.rank for layer in report(pair).layers] == [4]
    assert [layer.batch for layer in report(pair, torch.ones(7, 30)).layers] == [None]
    assert [layer.kind for layer in report(pair.half()).layers] == ["TwoFactors"]
    pair.float()[1].weight.data[0, 0] = math.nan
    (broken,) = report(pair).layers
    assert broken.note == "NaN or Inf"
    assert math.isnan(broken.cond)
    pair[0] = nn.Sequential(pair[0])
    assert [layer.kind for layer in report(pair).layers] == ["Linear", "Linear"]


def test_shared_factors_count_once():
    model = two_factors(mlp(64, 10, (40, 40)), 5, exclude="fc1")
    model.fc3[0].weight = model.fc2[0].weight
    found = report(model)
    assert [layer.note for layer in found.layers][1:] == ["", "weight of fc2"]
    assert found.layers[2].trained_weights == 0


def test_the_command_prints_the_share_that_it_trains(tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("sklearn")
    from command_line import invoke

    from lrmanifold.experiments import runs

    words = "train --method factors --rank 8 --epochs 1 --batch-size 512 --out"
    result = invoke(*words.split(), tmp_path)
    assert result.exit_code == 0, result.output
    assert "trained (100.0%)" not in result.output
    found = runs.load_results(tmp_path)
    report_of = found["report"]
    share = report_of["trained_parameters"] / report_of["dense_parameters"]
    assert share == pytest.approx(found["weights_kept"])
    last = max(layer["cond"] for layer in report_of["layers"][:2])
    assert last == pytest.approx(found["history"]["cond"][-1], rel=1e-5)
