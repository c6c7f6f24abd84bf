"""Low-rank transposed convolutions against torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d

PAIRS = {
    1: (LowRankConvTranspose1d, nn.ConvTranspose1d),
    2: (LowRankConvTranspose2d, nn.ConvTranspose2d),
    3: (LowRankConvTranspose3d, nn.ConvTranspose3d),
}
F64 = {"dtype": torch.float64}


@st.composite
def arguments(draw):
    d, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return d, {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": draw(st.integers(1, 3)),
        "stride": stride,
        "padding": draw(st.integers(0, 1)),
        "output_padding": draw(st.integers(0, max(stride, dilation) - 1)),
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }


def limit(args, d):
    inner = args["out_channels"] * args["kernel_size"] ** d
    return min(args["in_channels"], inner) // args["groups"]


@settings(max_examples=60)
@given(drawn=arguments(), gradient=st.sampled_from(["factors", "probe"]), seed=seeds)
def test_full_rank_is_the_dense_layer_with_its_gradients(device, drawn, gradient, seed):
    torch.manual_seed(seed)
    d, args = drawn
    ours, theirs = PAIRS[d]
    dense = theirs(**args, device=device, **F64)
    layer = ours.from_dense(dense, limit(args, d), tau=None, gradient=gradient)
    x = torch.randn(2, args["in_channels"], *(4,) * d, device=device, **F64).requires_grad_()
    z = x.detach().clone().requires_grad_()
    y, expected = layer(x), dense(z)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-9)
    M, X = layer.manifold, layer.weight.detach()
    xi = M.egrad2rgrad(X, layer.weight.grad)
    G = layer.matricised(dense.weight.grad)
    torch.testing.assert_close(xi, M.project_ambient(X, G), rtol=1e-6, atol=1e-7)
    back = layer.to_dense()
    assert repr(back) == repr(dense)
    torch.testing.assert_close(back.weight, dense.weight, rtol=1e-9, atol=1e-10)
    folded = lrm.fold(nn.Sequential(copy.deepcopy(layer)))
    torch.testing.assert_close(folded(z), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(folded[0].weight, dense.weight, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_folded_one_is_scripted_and_a_low_rank_one_traced():
    layer, x = LowRankConvTranspose1d(4, 6, 3, 2), torch.randn(2, 4, 5)
    expected = layer(x)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), expected)
    folded = lrm.fold(nn.Sequential(layer))
    torch.testing.assert_close(torch.jit.script(folded)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_size_chooses_among_the_sizes_of_a_stride(dtype):
    dense = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dtype=dtype)
    layer = LowRankConvTranspose2d.from_dense(dense, 4, tau=None)
    x = torch.randn(2, 4, 5, 6, dtype=dtype)
    for size in ([9, 11], [10, 12], (2, 6, 9, 12)):
        y = layer(x, output_size=size)
        torch.testing.assert_close(y, dense(x, output_size=list(size)), rtol=1e-4, atol=1e-5)
    assert layer.output_padding == (0, 0)
    for size in ([11, 11], [8, 11], [9]):
        with pytest.raises(ValueError, match="output_size must have 2 numbers between"):
            layer(x, output_size=size)


def test_factorize_and_densify_keep_the_function_flags_and_state():
    model = nn.Sequential(nn.ConvTranspose2d(32, 16, 4, stride=2, groups=2), nn.ReLU()).eval()
    model[0].weight.requires_grad_(False)
    bias = model[0].bias
    lrm.factorize(model, 0.25)
    layer = model[0]
    assert isinstance(layer, LowRankConvTranspose2d)
    assert layer.bias is bias
    assert (layer.rank, layer.weight.requires_grad, layer.training) == (4, False, False)
    other = LowRankConvTranspose2d(32, 16, 4, 2, stride=2, groups=2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 32, 5, 5)
    expected = model(x)
    torch.testing.assert_close(other(x).relu(), expected)
    lrm.densify(model)
    assert type(model[0]) is nn.ConvTranspose2d
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="the shape of the dense weight"):
        other.load_state_dict(model[0].state_dict())


def test_the_report_measures_dense_and_low_rank_ones_alike():
    dense = nn.ConvTranspose1d(8, 6, 4, groups=2, dtype=torch.float64)
    low = LowRankConvTranspose1d.from_dense(dense, 4, tau=None)
    a, b = (lrm.report(m).layers[0] for m in (dense, low))
    assert a.shape == b.shape == (12, 4)
    for key in ("rank", "groups", "dense_weights"):
        assert getattr(a, key) == getattr(b, key)
    assert a.sigma_max == pytest.approx(b.sigma_max)
    assert a.cond == pytest.approx(b.cond)


def test_its_certified_bound_is_the_dense_ones_and_no_input_beats_it():
    low = nn.Sequential(LowRankConvTranspose2d(4, 6, 3, 2, stride=2, padding=1))
    bound = lrm.certify.lipschitz(low, (4, 5, 5)).total
    dense = lrm.densify(copy.deepcopy(low))
    assert bound == pytest.approx(lrm.certify.lipschitz(dense, (4, 5, 5)).total, rel=1e-4)
    x = torch.randn(1, 4, 5, 5)
    for _ in range(200):  # the power method on the map without its bias
        x = x.requires_grad_()
        y = dense(x) - dense(torch.zeros_like(x))
        (g,) = torch.autograd.grad(0.5 * y.square().sum(), x)
        x = (g / g.norm()).detach()
    measured = float((dense(x) - dense(torch.zeros_like(x))).detach().norm())
    assert 0.5 * bound < measured <= bound * (1 + 1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"min\(m, n\) = 4, got 5"):
        LowRankConvTranspose1d(4, 6, 3, 5)
    with pytest.raises(ValueError, match="zeros"):
        LowRankConvTranspose1d(4, 6, 3, 2, padding_mode="circular")
    with pytest.raises(TypeError, match="module must be a ConvTranspose1d"):
        LowRankConvTranspose1d.from_dense(nn.Conv1d(4, 4, 3), 2)
