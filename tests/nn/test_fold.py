"""Folded models: torch's own layers, two factors each, the same function."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lrmanifold as lrm


def closeness(dtype: torch.dtype) -> dict[str, float]:
    tol = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-2}[dtype]
    return {"rtol": 10 * tol, "atol": tol}


def anywhere(layer: lrm.nn.LowRankLayer) -> lrm.nn.LowRankLayer:
    """The layer at a random point, whose core is no multiple of the identity."""
    with torch.no_grad():
        layer.weight.copy_(layer.manifold.random(*layer.weight.shape, dtype=torch.float64))
    return layer


@given(
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    rank=st.integers(1, 9),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    tau=st.one_of(st.none(), st.floats(0, 2)),
    gradient=st.sampled_from(["factors", "probe"]),
)
def test_folded_linear_layers_have_the_same_function(m, n, rank, bias, dtype, tau, gradient):
    rank = min(rank, m, n)
    layer = lrm.nn.LowRankLinear(n, m, rank, bias, tau=tau, gradient=gradient, dtype=dtype)
    anywhere(layer)
    x = torch.randn(3, 2, n, dtype=dtype)
    pair = lrm.fold(layer)
    torch.testing.assert_close(pair(x), layer(x), **closeness(dtype))
    torch.testing.assert_close(layer.to_dense()(x), layer(x), **closeness(dtype))
    assert [type(part) for part in pair] == [nn.Linear, nn.Linear]
    weights = sum(part.weight.numel() for part in pair)
    assert weights == (m + n) * rank


@given(
    dim=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
    rank=st.integers(1, 3),
    bias=st.booleans(),
)
def test_folded_convolutions_have_the_same_function(
    dim, groups, stride, dilation, padding, mode, rank, bias
):
    if padding == "same":
        stride = 1
    kind = (lrm.nn.LowRankConv1d, lrm.nn.LowRankConv2d, lrm.nn.LowRankConv3d)[dim - 1]
    layer = kind(
        4,
        6,
        2,
        rank,
        stride,
        padding,
        dilation,
        groups,
        bias,
        mode,
        dtype=torch.float64,
    )
    anywhere(layer)
    x = torch.randn(2, 4, *(6,) * dim, dtype=torch.float64)
    pair = lrm.fold(layer)
    torch.testing.assert_close(pair(x), layer(x), **closeness(torch.float64))
    torch.testing.assert_close(layer.to_dense()(x), layer(x), **closeness(torch.float64))
    assert (
        sum(part.weight.numel() for part in pair)
        == groups * (6 // groups + 8 // groups * 2 ** (dim - 1)) * rank
    )


def test_whole_models_are_folded_in_place_with_their_modes_hooks_and_switches():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 12)).eval()
    model[3].requires_grad_(False)
    lrm.factorize(model, rank=3)
    calls = []
    model[0].register_forward_hook(lambda *a: calls.append(1))
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    assert lrm.fold(model) is model
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2
    assert not any(isinstance(m, lrm.nn.LowRankLayer) for m in model.modules())
    assert not any(m.training for m in model.modules())
    assert [p.requires_grad for p in model[3].parameters()] == [False] * 3
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_shared_layers_stay_shared_and_adapters_are_merged():
    shared = lrm.nn.LowRankLinear(6, 6, 2)
    adapter = lrm.nn.LowRankAdapter(nn.Linear(6, 6), 2)
    model = nn.Sequential(shared, nn.Tanh(), shared, adapter)
    x = torch.randn(3, 6)
    expected = model(x)
    lrm.fold(model)
    assert model[0] is model[2]
    assert type(model[3]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_transformer_layers_keep_off_their_fused_path():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    lrm.factorize(layer, rank=4)
    with torch.no_grad():
        expected = layer(x)
        lrm.fold(layer)
        torch.testing.assert_close(layer(x), expected)
        layer.train()
        layer.eval()
        torch.testing.assert_close(layer(x), expected)
