"""transformers' Conv1D, also where transformers is not installed: a class of the same code."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankLinear, LowRankTransposedLinear

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture
def conv1d(monkeypatch):
    """The class, of transformers if it is there."""
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:

        class Conv1D(nn.Module):
            def __init__(self, nf, nx):
                super().__init__()
                self.nf, self.nx = nf, nx
                self.weight = nn.Parameter(torch.empty(nx, nf))
                self.bias = nn.Parameter(torch.zeros(nf))
                nn.init.normal_(self.weight, std=0.02)

            def forward(self, x):
                y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
                return y.view(*x.shape[:-1], self.nf)

        Conv1D.__module__ = "transformers.pytorch_utils"
        fake = types.ModuleType("transformers.pytorch_utils")
        fake.Conv1D = Conv1D
        monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", fake)
    return Conv1D


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sizes", [(12, 5), (5, 12)])
def test_full_rank_is_the_dense_layer_both_ways(device, dtype, sizes, conv1d):
    dense = conv1d(*sizes).to(device, dtype)
    nn.init.normal_(dense.weight)
    layer = LowRankTransposedLinear.from_dense(dense, 5, tau=None)
    x = torch.randn(3, 4, sizes[1], dtype=dtype, device=device)
    tolerance = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(layer(x), dense(x), **tolerance)
    torch.testing.assert_close(layer.dense_weight(), dense.weight, **tolerance)
    back = layer.to_dense()
    assert type(back) is conv1d
    assert (back.nx, back.nf) == (layer.nx, layer.nf) == (dense.nx, dense.nf)
    torch.testing.assert_close(back.weight, dense.weight, **tolerance)
    torch.testing.assert_close(back(x), dense(x), **tolerance)
    folded = lrm.fold(nn.Sequential(copy.deepcopy(layer)))
    torch.testing.assert_close(folded(x), dense(x), **tolerance)
    torch.testing.assert_close(folded[0].weight, dense.weight, **tolerance)


def test_a_block_of_gpt_2_is_factorized_reported_and_densified(conv1d):
    model = nn.ModuleDict(
        {"c_attn": conv1d(96, 32), "c_proj": conv1d(32, 32), "n": nn.Linear(4, 4)}
    )
    model.eval()
    biases = {k: model[k].bias for k in ("c_attn", "c_proj")}
    a, _, _ = lrm.report(model).layers
    assert (a.kind, a.shape, a.rank) == ("Conv1D", (96, 32), 32)
    plans = []
    lrm.factorize(model, 0.25, summary=plans.append)
    assert {d.name: (d.shape, d.rank) for d in plans[0].decisions}["c_attn"] == ((96, 32), 8)
    assert all(type(model[k]) is LowRankTransposedLinear for k in biases)
    assert all(model[k].bias is b for k, b in biases.items())
    assert not model["c_attn"].training
    assert lrm.report(model).layers[0].shape == (96, 32)
    x = torch.randn(2, 32)
    expected = model["c_attn"](x)
    other = LowRankTransposedLinear(96, 32, 3)
    other.load_state_dict(model["c_attn"].state_dict())
    assert torch.equal(other(x), expected)
    lrm.densify(model)
    assert all(type(model[k]) is conv1d for k in biases)
    torch.testing.assert_close(model["c_attn"](x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="the shape of the dense weight"):
        other.load_state_dict(model["c_attn"].state_dict())


def test_energy_counts_and_the_bound_holds(conv1d):
    dense = conv1d(24, 16)
    nn.init.normal_(dense.weight)
    model, plans = nn.ModuleDict({"a": dense}), []
    s2 = torch.linalg.svdvals(dense.weight.detach().double()).square()
    lrm.factorize(model, energy=0.5, keep_larger=True, summary=plans.append)
    rank = plans[0].decisions[0].rank
    assert float(s2[:rank].sum() / s2.sum()) >= 0.5 > float(s2[: rank - 1].sum() / s2.sum())
    bound = lrm.certify.lipschitz(nn.Sequential(model["a"]), (16,)).total
    norm = torch.linalg.matrix_norm(model["a"].dense_weight().detach().double(), 2)
    assert bound == pytest.approx(float(norm), rel=1e-5)


def test_without_transformers_it_is_a_linear_layer_that_says_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    layer = LowRankTransposedLinear(6, 4, 2)
    assert isinstance(layer, LowRankLinear)
    assert layer(torch.randn(3, 4)).shape == (3, 6)
    with pytest.raises(ImportError, match="pip install transformers"):
        layer.to_dense()


def test_it_is_a_head_that_certificates_know():
    """Where the margin is taken, the weight must be (classes, inputs), not the dense one's."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), LowRankTransposedLinear(3, 8, 2)).double()
    plain = lrm.nn.LowRankLinear(8, 3, 2).double()
    plain.load_state_dict(model[2].state_dict())
    twin = nn.Sequential(model[0], nn.ReLU(), plain)
    x = torch.randn(5, 6, dtype=torch.float64)
    y = model(x).argmax(1)
    a, b = (lrm.certify.LipschitzBound(m, (6,)).evaluate() for m in (model, twin))
    assert a[2].shape == (3, 8)
    torch.testing.assert_close(a[2], b[2])
    radii = [lrm.certify.radius(m, x, y) for m in (model, twin)]
    assert (radii[0] > 0).all()
    torch.testing.assert_close(*radii)
