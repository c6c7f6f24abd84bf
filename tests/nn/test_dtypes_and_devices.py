"""Layers that are complex, quantized, of 8 bits or sparse are left and named; devices of inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lrmanifold as lrm
from lrmanifold.nn import LowRankAdapter, LowRankConv2d, LowRankLinear, Plan


def with_weight(value: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(12, 10)
    layer.weight = nn.Parameter(value, requires_grad=value.dtype.is_floating_point)
    return layer


class Packed(nn.Linear):
    """Two 4-bit numbers a byte, as bitsandbytes keeps them."""

    def __init__(self) -> None:
        super().__init__(12, 10)
        bits = torch.randint(0, 255, (60, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(bits, requires_grad=False)


ODD = {
    "int8": lambda: with_weight(torch.ones(10, 12, dtype=torch.int8)),
    "float8": lambda: with_weight(torch.ones(10, 12).to(torch.float8_e4m3fn)),
    "complex64": lambda: with_weight(torch.randn(10, 12, dtype=torch.complex64)),
    "sparse": lambda: with_weight(torch.ones(10, 12).to_sparse()),
    "packed": Packed,
    "complex convolution": lambda: nn.Conv2d(2, 3, 2, dtype=torch.complex64),
}


@pytest.fixture(params=list(ODD))
def odd(request):
    return ODD[request.param]()


@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.9}, {"compression": 0.2}])
def test_odd_layers_stay_and_the_others_become_low_rank(odd, how):
    model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(30, 30)})
    plans: list[Plan] = []
    lrm.factorize(model, summary=plans.append, keep_larger=True, include="*", **how)
    assert model["odd"] is odd
    assert isinstance(model["plain"], LowRankLinear)
    reasons = {d.name: d.reason for d in plans[0].decisions}
    assert any(word in reasons["odd"] for word in ("its weight is", "a subclass (Packed)"))


def test_the_report_has_a_row_for_them_that_says_so(odd):
    model = nn.ModuleDict({"odd": odd, "plain": LowRankLinear(30, 30, 2)})
    report = lrm.report(model)
    first, second = report.layers
    assert first.note.startswith("not measured: its weight is ")
    assert first.rank == 0
    assert math.isnan(first.cond)
    assert math.isnan(report.max_cond)
    assert math.isnan(report.cond_product)
    assert not second.note
    assert first.dense_weights == odd.weight.numel()
    assert report.trained_parameters == sum(p.numel() for p in model.parameters())
    assert "not measured" in str(report)
    assert report.to_dict()["layers"][0]["cond"] is None


def test_complex_and_integer_matrices_are_refused_by_name():
    M = lrm.FixedRank(10, 12, 2)
    for bad in (torch.randn(10, 12, dtype=torch.complex64), torch.ones(10, 12, dtype=torch.int64)):
        with pytest.raises(TypeError, match="W must be a real floating point tensor, got a tensor"):
            M.from_dense(bad)
    layer = LowRankLinear(12, 10, 2)
    before = layer.weight.detach().clone()
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=r"a low-rank layer must be in one of .*, got torch\."):
            layer.to(dtype)
        assert torch.equal(layer.weight, before)
        with pytest.raises(TypeError, match="dtype must be one of"):
            LowRankLinear(12, 10, 2, dtype=dtype)
    with pytest.raises(TypeError, match="module must have a real, dense weight"):
        LowRankLinear.from_dense(ODD["complex64"](), 2)
    with pytest.raises(ValueError, match=r"its weight is torch\.int8"):
        LowRankAdapter(ODD["int8"](), 2)


def test_the_report_of_pruned_layers_counts_their_weights_once():
    model = nn.Sequential(nn.Linear(12, 10))
    prune.l1_unstructured(model[0], "weight", 0.3)
    report = lrm.report(model)
    assert report.other_parameters == 10
    assert report.dense_parameters == 130


@pytest.fixture
def default_on_meta():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("default_on_meta")
def test_tensors_are_made_where_their_inputs_are():
    generator = torch.Generator("cpu").manual_seed(0)
    on = {"device": "cpu"}
    dense = nn.Sequential(
        nn.Conv2d(2, 6, 3, groups=2, **on), nn.Flatten(), nn.Linear(24, 12, **on), nn.ReLU(),
        nn.Linear(12, 4, **on),
    )  # fmt: skip
    x = torch.randn(5, 2, 4, 4, generator=generator, **on)
    y = torch.zeros(5, dtype=torch.int64, **on)
    model = lrm.factorize(dense, rank=2, keep_larger=True)
    model[4] = LowRankAdapter(model[4].to_dense(), 2)
    model.append(LowRankLinear(4, 4, 2, **on)).append(LowRankConv2d(1, 1, 1, 1, **on))
    lrm.report(model)
    del model[6]
    assert lrm.report(model, example=x).max_cond < 10
    assert lrm.monitor(model).measure()["cond"] < 10
    assert lrm.robustness.condition_number(model.double(), x.double()).device.type == "cpu"
    model.float()
    for attack in (lrm.robustness.fgsm, lrm.robustness.pgd):
        assert attack(model, x, y, 0.1, clip=None).device.type == "cpu"
    M = model[2].manifold
    X = M.random(**on, generator=generator)
    for name in lrm.retractions.available():
        assert lrm.retractions.get(name)(M, X, M.proju(X, X)).device.type == "cpu"
    assert M.expmap(X, 0.01 * M.proju(X, X)).device.type == "cpu"
    assert M.from_dense(M.to_dense(X)).device.type == "cpu"
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    assert lrm.certify.lipschitz(model, (2, 4, 4)).total > 0
    for make in (lrm.optim.CondLR, lrm.optim.CondLRAdam, lrm.optim.CondLRMuon):
        optimizer = make(model.parameters(), lr=0.01)
        model(x).square().sum().backward()
        optimizer.step()
    assert lrm.report(model).max_cond < 10
    for back in (lrm.fold, lrm.densify):
        assert all(p.device.type == "cpu" for p in back(_copy(model)).parameters())


def _copy(model):
    import copy

    return copy.deepcopy(model)
