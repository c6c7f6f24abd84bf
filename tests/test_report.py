"""The report says of each layer what dense linear algebra says."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold.experiments.models import lenet5, mlp
from lrmanifold.report import Report, report


def low_rank_lenet() -> nn.Module:
    ranks = {"conv1": 4, "conv2": 10, "fc1": 20}
    return lrm.factorize(lenet5(), rank=ranks, tau=0.1)


def by_name(found: Report) -> dict:
    return {layer.name: layer for layer in found.layers}


def test_singular_values_are_those_of_the_dense_weight():
    model = low_rank_lenet()
    for layer in report(model).layers:
        module = model.get_submodule(layer.name)
        weight = module.dense_weight() if layer.low_rank else module.weight
        s = torch.linalg.svdvals(weight.detach().flatten(1).double())[: layer.rank]
        assert layer.sigma_max == pytest.approx(s[0].item(), rel=1e-5)
        assert layer.sigma_min == pytest.approx(s[-1].item(), rel=1e-5)
        assert layer.cond == pytest.approx((s[0] / s[-1]).item(), rel=1e-5)


def test_dense_and_low_rank_layers_are_listed_alike():
    layers = by_name(report(low_rank_lenet()))
    assert list(layers) == ["conv1", "conv2", "fc1", "fc2"]
    assert [layer.low_rank for layer in layers.values()] == [True, True, True, False]
    assert layers["conv2"].kind == "LowRankConv2d"
    assert (layers["conv2"].shape, layers["conv2"].rank, layers["conv2"].tau) == (
        (50, 500),
        10,
        0.1,
    )
    assert 0 <= layers["fc1"].drift < 1e-5
    assert (layers["fc2"].shape, layers["fc2"].rank) == ((10, 500), 10)
    assert layers["fc2"].drift is None
    assert layers["fc2"].tau is None


def test_sizes_are_counted_dense_trained_and_folded():
    model = low_rank_lenet()
    found = report(model)
    fc1 = by_name(found)["fc1"]
    assert fc1.dense_weights == 500 * 800
    assert fc1.trained_weights == (500 + 20 + 800) * 20
    assert fc1.folded_weights == (500 + 800) * 20
    assert found.trained_parameters == sum(p.numel() for p in model.parameters())
    assert found.dense_parameters == sum(p.numel() for p in lenet5().parameters()) == 431_080
    cores = 4**2 + 10**2 + 20**2
    assert found.folded_parameters == found.trained_parameters - cores


def test_model_without_low_rank_layers():
    found = report(mlp(6, 3, (5,)))
    assert [layer.low_rank for layer in found.layers] == [False, False]
    assert found.dense_parameters == found.trained_parameters == found.folded_parameters == 53
    empty = report(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)))
    assert (empty.layers, empty.other_parameters, empty.max_cond) == ((), 8, 1.0)
    assert "no linear or convolutional layer" in str(empty)


def test_rank_of_a_dense_weight_is_the_numerical_one():
    """A truncated network, made dense again, still has its rank; also stored in half precision."""
    layer = lrm.nn.LowRankLinear(70, 60, 9, tau=0.5)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        dense = lrm.densify(copy.deepcopy(layer).to(dtype))
        found = report(dense).layers[0]
        assert found.rank == 9, dtype
        assert found.cond < 1.6, dtype
        assert found.has_kernel


def test_zero_weight_has_rank_zero_and_no_cond():
    linear = nn.Linear(4, 3)
    nn.init.zeros_(linear.weight)
    found = report(linear)
    assert found.layers[0].rank == 0
    assert math.isnan(found.layers[0].cond)
    assert found.to_dict()["layers"][0]["cond"] is None


@pytest.mark.parametrize("low_rank", [True, False])
def test_grouped_convolution_reports_the_worst_group(low_rank):
    conv = nn.Conv2d(6, 12, 3, groups=3)
    model = nn.Sequential(conv)
    if low_rank:
        model[0] = lrm.nn.LowRankConv2d.from_dense(conv, 2, tau=None)
    groups = conv.weight.detach().reshape(3, 4, 18).double()
    s = torch.linalg.svdvals(groups)[:, : 2 if low_rank else 4]
    layer = report(model).layers[0]
    assert (layer.shape, layer.groups, layer.rank) == ((4, 18), 3, s.shape[1])
    assert layer.sigma_max == pytest.approx(s.max().item(), rel=1e-5)
    assert layer.sigma_min == pytest.approx(s.min().item(), rel=1e-5)
    assert layer.cond == pytest.approx((s[:, 0] / s[:, -1]).max().item(), rel=1e-5)
    assert layer.dense_weights == conv.weight.numel()
    assert layer.trained_weights == (3 * (4 + 2 + 18) * 2 if low_rank else 216)
    assert "3 x (4 x 18)" in str(report(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_single(dtype):
    layer = lrm.nn.LowRankLinear.from_dense(nn.Linear(40, 30), 5, tau=0.1).to(dtype)
    found = report(layer).layers[0]
    U, S, V = (factor.detach().double() for factor in layer.factors)
    s = torch.linalg.svdvals(S)
    assert found.cond == pytest.approx((s[0] / s[-1]).item(), rel=1e-5)
    drift = max((Q.mT @ Q - torch.eye(5)).abs().max().item() for Q in (U, V))
    assert found.drift == pytest.approx(drift, abs=1e-6)  # not rounded to the dtype's grid
    assert 1e-6 < found.drift < 1e-2
    assert found.note == ""


def test_layer_off_its_manifold_or_bound_is_noted():
    layer = lrm.nn.LowRankLinear(8, 6, 3, tau=0.1)
    with torch.no_grad():
        layer.factors.S[0, 0] *= 3
    assert report(layer).layers[0].note == "cond above 1 + tau"
    with torch.no_grad():
        layer.factors.U.mul_(1.5)
    assert report(layer).layers[0].note.startswith("left the manifold")
    assert "left the manifold (U, V not orthonormal)" in str(report(layer))
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    broken = report(layer)
    assert broken.layers[0].note == "NaN or Inf"
    assert json.loads(json.dumps(broken.to_dict(), allow_nan=False))["layers"][0]["cond"] is None


def test_dense_layer_with_nan_is_noted():
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight[0, 0] = float("inf")
    assert report(linear).layers[0].note == "NaN or Inf"


def test_meta_and_lazy_layers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'0' \(LowRankLinear\) is on the meta device"):
        report(nn.Sequential(lrm.nn.LowRankLinear(8, 6, 3, device="meta")))
    with pytest.raises(ValueError, match=r"'0' \(Linear\) is on the meta device"):
        report(nn.Sequential(nn.Linear(3, 2, device="meta")))
    with pytest.raises(ValueError, match="lazy"):
        report(nn.Sequential(nn.LazyLinear(3)))


def test_shared_weight_is_counted_once():
    a, b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    b.weight = a.weight
    found = report(nn.Sequential(a, b, a))
    assert [layer.note for layer in found.layers] == [
        "its weight is tied to '1.weight'",
        "weight of 0",
    ]
    assert found.trained_parameters == 25


def test_parametrized_and_normalized_layers():
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4, bias=False)).train()
    before = copy.deepcopy(spectral.state_dict())
    found = report(spectral)
    assert found.layers[0].sigma_max == pytest.approx(1.0, rel=0.2)
    assert found.other_parameters == 0
    assert all(torch.equal(before[k], v) for k, v in spectral.state_dict().items())
    assert spectral.training


def test_nothing_of_the_model_changes(device):
    model = low_rank_lenet().to(device)
    model(torch.randn(2, 1, 28, 28, device=device)).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    with torch.enable_grad():
        found = report(model)
    assert all(isinstance(layer.cond, float) for layer in found.layers)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [p._version for p in model.parameters()] == versions
    assert all(p.requires_grad for p in model.parameters())


def test_product_of_conds_is_labelled_as_no_bound():
    found = report(low_rank_lenet())
    assert found.cond_product == pytest.approx(math.prod(layer.cond for layer in found.layers))
    assert "NOT a bound: docs/mathematics.md, section 6" in str(found)
    text = " ".join(found.table(wide=True).split())
    assert "This is NOT a bound for the network's condition number" in text
    assert "4 of 4 layers have a kernel" in text
    assert "cosθ_i(x) = |V_iᵀz_i|/|z_i|" in text
    assert "not of the map" in text
    assert found.to_dict()["cond_product_is_a_bound"] is False


def test_product_really_is_no_bound_but_with_cosines_it_is():
    """The reason of the footer (mathematics 6), on two linear layers without biases."""
    torch.manual_seed(1)
    a = lrm.nn.LowRankLinear(16, 16, 4, bias=False, tau=0.1).double()
    b = lrm.nn.LowRankLinear(16, 16, 4, bias=False, tau=0.1).double()
    model = nn.Sequential(a, b)
    x = torch.randn(1, 16, dtype=torch.float64)
    measured = lrm.robustness.condition_number(model, x).item()
    found = report(model)
    assert measured > found.cond_product
    z, cosines = x, 1.0
    for layer in (a, b):
        cosines *= ((z @ layer.factors.V).norm() / z.norm()).item()
        z = layer(z)
    assert measured <= found.cond_product / cosines * (1 + 1e-9)


def test_dict_is_strict_json_and_table_has_a_row_for_each_layer():
    found = report(low_rank_lenet())
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [layer["name"] for layer in again["layers"]] == ["conv1", "conv2", "fc1", "fc2"]
    assert again["layers"][0]["shape"] == [20, 25]
    assert again["trained_parameters"] == found.trained_parameters
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["layer", "conv1", "conv2", "fc1", "fc2"]
    assert f"{found.dense_parameters:,} if all were dense" in str(found)
    assert json.loads(found.to_json()) == again


def test_public_name():
    assert lrm.report(nn.Linear(3, 2)).layers[0].name == ""


# -- all that has weights


class Zoo(nn.Module):
    """One of each kind that stays dense, and one tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.positions = nn.Parameter(torch.zeros(8, 16))
        self.attention = nn.MultiheadAttention(16, 2)
        self.rnn, self.gru = nn.LSTM(16, 16), nn.GRU(16, 16)
        self.norm, self.bilinear = nn.LayerNorm(16), nn.Bilinear(4, 4, 4)
        self.pruned = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.twin, self.linear = nn.Linear(16, 16), nn.Linear(16, 16)
        self.twin.weight = self.linear.weight
        self.up = nn.ConvTranspose2d(16, 4, 2)
        self.quantized = nn.Linear(8, 8)
        self.quantized.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), False)


@pytest.mark.parametrize("low_rank", [False, True])
def test_every_module_with_weights_is_listed_and_the_shares_are_the_whole(low_rank):
    model, plans = Zoo(), []
    size = sum(p.numel() for p in model.parameters())
    if low_rank:
        lrm.factorize(model, rank=0.25, summary=plans.append)
        plan = plans[0]
        counted = [*(d.dense_weights for d in plan.decisions), *(o.weights for o in plan.others)]
        assert sum(counted) == size == plan.dense_weights
        assert plan.kept_weights == sum(p.numel() for p in model.parameters())
        named = {d.name for d in plan.decisions} | {o.name for o in plan.others}
        assert {"attention.q_proj", "attention.out_proj", "up", "twin", "embed", "gru"} <= named
        assert all(d.reason or d.rank for d in plan.decisions)
        assert all(o.reason for o in plan.others)
        assert "include names it" in str(plan)
        assert "100.0%" in str(plan)
    found = report(model)
    listed = [*(x.trained_weights for x in found.layers), *(o.weights for o in found.others)]
    assert sum(listed) == found.trained_parameters == sum(p.numel() for p in model.parameters())
    for module in ("embed", "rnn", "gru", "norm", "bilinear", "linear", "twin", "up", "quantized"):
        assert module in {x.name for x in (*found.layers, *found.others)}, module
    for text, words in ((str(found), "recurrent: no low-rank"), (str(found), "its own: positions")):
        assert words in text
    again = json.loads(found.to_json())
    assert sum(o["weights"] for o in again["others"]) == found.other_parameters


def test_the_table_has_80_columns_and_six_of_them(tmp_path):
    names = {"a_block_with_a_long_name": nn.ModuleDict({"a_layer_with_a_long_name": Zoo()})}
    found = report(lrm.factorize(nn.ModuleDict(names), rank=0.25))
    text = str(found)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.splitlines()[0].split() == ["layer", "kind", "shape", "rank", "cond", "share"]
    wide = report(nn.ModuleDict(names), wide=True)
    assert str(wide) == wide.table(wide=True) != wide.table(wide=False)
    assert "sigma_max" in str(wide)
    assert all(other.name in str(wide) for other in wide.others if other.matrices)
    with pytest.raises(TypeError, match="wide must be"):
        report(nn.Linear(2, 2), wide=1)


# -- cost


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_an_example_tells_the_cost_of_a_step(form):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 6)

        def forward(self, x):
            return self.fc(self.conv(x).mean((-2, -1))) + self.fc(self.conv(x).amax((-2, -1)))

    model = lrm.factorize(Net(), rank=2)
    model.train()
    x = torch.randn(5, 3, 7, 7)
    example = {"tensor": x, "tuple": (x,), "dict": {"x": x}}[form]
    found = {layer.name: layer for layer in report(model, example).layers}
    assert found["conv"].batch == 2 * 5 * 25  # used twice, 5 x 5 positions
    assert found["fc"].batch == 2 * 5
    assert "0.200" in str(report(model, example))
    assert report(model, example).to_dict()["layers"][0]["batch"] == 250
    assert model.training
    assert not model.conv._forward_hooks
    assert report(model).layers[0].batch is None


def test_ranks_just_below_a_multiple_of_16_are_pointed_out():
    model = nn.Sequential(lrm.nn.LowRankLinear(300, 300, 250), lrm.nn.LowRankLinear(300, 300, 256))
    assert "0 250 -> 256" in str(report(model))
    assert "1 256" not in str(report(model))
    assert "multiples" not in str(report(nn.Sequential(lrm.nn.LowRankLinear(9, 9, 3))))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("low_rank", [False, True])
def test_map_cond_of_a_circular_convolution_is_that_of_the_dense_map(low_rank, groups):
    torch.manual_seed(0)
    circular = {"padding": 1, "padding_mode": "circular", "bias": False, "groups": groups}
    conv = nn.Conv2d(4, 6, 3, **circular).double()
    if low_rank:
        conv = lrm.nn.LowRankConv2d.from_dense(conv, 2, tau=0.1)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    layer = report(nn.Sequential(conv), x).layers[0]
    basis = torch.eye(4 * 25, dtype=torch.float64).view(-1, 4, 5, 5)
    s = torch.linalg.svdvals(conv(basis).flatten(1))
    # the map's rank: of each group and frequency as many as it has filters or channels
    filters = 2 if low_rank else 6 // groups
    kept = s[: groups * 25 * min(filters, 4 // groups)]
    assert layer.map_cond == pytest.approx(float(kept[0] / kept[-1]), rel=1e-6)
    assert layer.map_cond > layer.cond  # not the kernel's
    text = str(report(nn.Sequential(conv), x))
    assert f"map cond {layer.map_cond:.4g}" in text
    assert report(nn.Sequential(conv)).layers[0].map_cond is None  # no size, no frequencies


def test_map_cond_of_separate_patches_is_that_of_the_kernel():
    conv = lrm.nn.LowRankConv2d(3, 8, 4, 5, stride=4, tau=0.1)
    layer = report(conv).layers[0]
    assert layer.map_cond == pytest.approx(layer.cond, rel=1e-5)
    padded = nn.Conv2d(3, 8, 3, padding=1)
    found = report(
        nn.Sequential(padded, nn.Flatten(), nn.Linear(8 * 25, 2)), torch.rand(1, 3, 5, 5)
    )
    assert [layer.map_cond for layer in found.layers] == [None, None]
    assert found.to_dict()["layers"][0]["map_cond"] is None
    lost = nn.Conv1d(2, 2, 1)
    with torch.no_grad():
        lost.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0]])[:, :, None])
    assert report(lost).layers[0].map_cond == math.inf


class Reading(nn.Module):
    """Reads its table as the weight of its head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(50, 32), nn.Linear(32, 32)

    def forward(self, ids):
        return nn.functional.linear(self.body(self.table(ids)), self.table.weight)


def test_tables_say_why_they_stay_before_they_are_advised_to_be_named():
    advice = "table of embeddings: include names it to factorize it"
    for model, reason in (
        (Reading(), "Reading reads its weight directly"),
        (nn.ModuleDict({"table": nn.Embedding(50, 32, max_norm=1.0)}), "max_norm=1.0 rewrites"),
        (nn.ModuleDict({"table": nn.Embedding(50, 32)}), advice),
    ):
        (row,) = (o for o in report(model).others if o.name == "table")
        assert row.reason.startswith(reason)
