"""Code that reads ``layer.weight`` instead of calling the layer gets the matrix, or stays dense."""

from __future__ import annotations

import copy

import pytest
import torch
from dense_cases import EXACT, low_rank_dense, plan_of
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankAdapter, LowRankConv2d, LowRankLinear


def encoder(where: str, kind: str) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    for block in model.layers:
        dense = getattr(block, where)
        if kind == "adapter":
            new = LowRankAdapter(dense, 4)
            with torch.no_grad():
                new.update.weight.copy_(new.update.manifold.random())
        elif kind == "folded":
            new = lrm.fold(LowRankLinear.from_dense(dense, 4))
        elif kind == "factorized":
            continue
        setattr(block, where, new)
    return lrm.factorize(model, rank=4, include=f"*.{where}") if kind == "factorized" else model


@pytest.mark.parametrize("where", ["linear1", "linear2"])
@pytest.mark.parametrize("kind", ["adapter", "folded", "factorized"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:enable_nested")
def test_transformers_compute_the_same_in_train_and_eval(where, kind, masked):
    model = encoder(where, kind)
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    options = {"src_key_padding_mask": mask} if masked else {}
    keep = ~mask if masked else torch.ones_like(mask)
    expected = model.train()(x, **options).detach()
    model.eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x, **options)[keep], expected[keep], rtol=0, atol=2e-6)


def test_an_adapted_output_projection_of_attention_acts_and_learns():
    attention = nn.MultiheadAttention(16, 2, batch_first=True).double()
    x = torch.randn(2, 5, 16).double()
    before = attention(x, x, x)[0]
    adapter = LowRankAdapter(attention.out_proj, 4)
    attention.out_proj = adapter
    torch.testing.assert_close(attention(x, x, x)[0], before, rtol=0, atol=0)
    with torch.no_grad():
        adapter.update.weight.copy_(adapter.update.manifold.random(dtype=torch.float64))
    moved = attention(x, x, x)[0]
    assert float((moved - before).detach().abs().max()) > 1e-2
    moved.square().sum().backward()
    assert float(adapter.update.weight.grad.abs().max()) > 0
    assert adapter.base_weight.grad is None
    attention.out_proj = adapter.merge()
    torch.testing.assert_close(attention(x, x, x)[0], moved, **EXACT)


@pytest.mark.parametrize("gradient", ["factors", "probe"])
def test_the_weight_of_an_adapter_is_differentiable_as_its_output_is(gradient):
    adapter = LowRankAdapter(low_rank_dense(), 3, gradient=gradient)
    with torch.no_grad():
        adapter.update.weight.copy_(adapter.update.manifold.random(dtype=torch.float64))
    x = torch.randn(7, 10).double()
    assert adapter.weight.shape == (12, 10)
    wanted = list(adapter.update.parameters())
    one = torch.nn.functional.linear(x, adapter.weight, adapter.bias)
    torch.testing.assert_close(one, adapter(x), **EXACT)
    grads = [torch.autograd.grad(y.square().sum(), wanted)[0] for y in (one, adapter(x))]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "layer",
    [
        LowRankLinear(10, 12, 3, dtype=torch.float64),
        LowRankConv2d(4, 6, 3, 2, 2, 1, 1, 2, dtype=torch.float64),
    ],
    ids=["linear", "grouped convolution"],
)
def test_folded_layers_answer_for_the_dense_layer(layer):
    folded, dense = lrm.fold(layer), layer.to_dense()
    torch.testing.assert_close(folded.weight, dense.weight, **EXACT)
    assert folded.bias is layer.bias
    for name in ("in_features", "out_features", "in_channels", "kernel_size", "stride", "groups"):
        assert getattr(folded, name, None) == getattr(dense, name, None)
    folded.weight.sum().backward()
    assert all(part.weight.grad is not None for part in folded)
    plain = nn.Sequential(*copy.deepcopy(list(folded)))
    plain.load_state_dict(folded.state_dict())


class Windows(nn.Module):
    """Reads a projection's weight in a method that its forward calls, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"proj": nn.Linear(10, 10)})
        self.qkv, self.other, self.start = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)

    def reset(self) -> None:
        nn.init.zeros_(self.start.weight)  # no forward pass comes here

    def attend(self, x):
        return nn.functional.linear(x, self.qkv.weight) + self.start(x)

    def forward(self, x):
        return self.attend(x).to(self.other.weight.dtype) + self.other(x)


def test_weights_that_a_forward_pass_reads_stay_dense():
    plan = plan_of(Windows())
    assert plan["qkv"] == "Windows reads its weight directly"
    assert plan["start"] == plan["other"] == plan["inner.proj"] == ""


def test_weights_that_a_hook_reads_stay_dense():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * module.weight.norm(),))
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert plan_of(model) == {"0": "a hook reads its weight directly", "1": ""}
