"""Low-rank convolutions against torch's dense ones, for every argument."""

from __future__ import annotations

import copy
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn
from torch.func import functional_call

import lrmanifold as lrm
from lrmanifold.nn import LowRankConv1d, LowRankConv2d, LowRankConv3d

PAIRS: dict[int, tuple[Any, Any]] = {
    1: (LowRankConv1d, nn.Conv1d),
    2: (LowRankConv2d, nn.Conv2d),
    3: (LowRankConv3d, nn.Conv3d),
}
F64 = {"dtype": torch.float64}
taus = st.sampled_from([None, 0.0, 0.1, 2.0])


def one_or_each(d: int, low: int, high: int) -> st.SearchStrategy:
    """An int, or a tuple of one for each dimension."""
    number = st.integers(low, high)
    return st.one_of(number, st.tuples(*[number] * d))


@st.composite
def arguments(draw) -> tuple[int, dict, tuple[int, ...]]:
    """Dimension, constructor arguments, and the spatial size of an input that they fit."""
    d = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    args = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": draw(one_or_each(d, 1, 4 if d < 3 else 3)),
        "stride": draw(one_or_each(d, 1, 3)),
        "padding": draw(st.one_of(one_or_each(d, 0, 2), st.sampled_from(["same", "valid"]))),
        "dilation": draw(one_or_each(d, 1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    if args["padding"] == "same":
        args["stride"] = 1
    return d, args, tuple(draw(st.integers(7, 9)) for _ in range(d))


def limit(args: dict, d: int) -> int:
    kernel = args["kernel_size"]
    taps = torch.tensor(kernel if isinstance(kernel, tuple) else (kernel,) * d).prod()
    g = args["groups"]
    return min(args["out_channels"] // g, args["in_channels"] // g * int(taps))


def matricised_kernel(layer) -> Tensor:
    """U S Vᵀ of each group, stacked along the output channels, in the kernel's shape.

    Column p C + c of the matrix is position p of the kernel, counted as by flatten, and channel c.
    """
    blocks = layer.weight.reshape(-1, *layer.weight.shape[-2:])
    W = torch.cat([U @ S @ V.mT for U, S, V in map(layer.manifold.unpack, blocks)])
    C = layer.in_channels // layer.groups
    channels = [W[:, c::C].reshape(-1, *layer.kernel_size) for c in range(C)]
    return torch.stack(channels, 1)


def matricised(layer, weight: Tensor) -> Tensor:
    """The other way, for each group."""
    columns = [w for position in weight.flatten(2).unbind(-1) for w in position.unbind(-1)]
    return torch.stack(columns, -1).reshape(-1, layer.manifold.m, layer.manifold.n)


@settings(max_examples=80)
@given(
    drawn=arguments(),
    tau=taus,
    share=st.floats(0.0, 1.0),
    batch=st.sampled_from([None, 0, 1, 2]),
    gradient=st.sampled_from(["factors", "probe"]),
    seed=seeds,
)
def test_output_and_all_gradients_are_those_of_the_dense_convolution(
    device, drawn, tau, share, batch, gradient, seed
):
    torch.manual_seed(seed)
    d, args, space = drawn
    ours, theirs = PAIRS[d]
    rank = max(1, round(share * limit(args, d)))
    layer = ours(rank=rank, tau=tau, gradient=gradient, device=device, **args, **F64)
    dense = theirs(device=device, **args, **F64)
    dense.weight.data = matricised_kernel(layer).detach()
    if args["bias"]:
        dense.bias.data = layer.bias.detach().clone()
    lead = () if batch is None else (batch,)
    x = torch.randn(*lead, args["in_channels"], *space, device=device, **F64).requires_grad_()
    z = x.detach().clone().requires_grad_()
    y, expected = layer(x), dense(z)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-10)
    if args["bias"]:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-10, atol=1e-10)
    # The chain rule from the dense gradient to the factors, or to P_W G at once.
    M, X = layer.manifold, layer.weight.detach()
    G = matricised(layer, dense.weight.grad).reshape(*X.shape[:-2], M.m, M.n)
    assert torch.equal(layer.matricised(dense.weight.grad), G)
    xi = M.egrad2rgrad(X, layer.weight.grad)
    torch.testing.assert_close(xi, M.project_ambient(X, G), rtol=1e-8, atol=1e-8)
    if gradient == "factors":
        layer.weight.grad = None
        matricised_kernel(layer).backward(dense.weight.grad)
        torch.testing.assert_close(
            layer.weight.grad, M.pack(*_factor_gradients(M.unpack(X), G)), rtol=1e-9, atol=1e-9
        )


def _factor_gradients(factors, G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = factors
    return G @ V @ S.mT, U.mT @ G @ V, G.mT @ U @ S


@settings(max_examples=50)
@given(drawn=arguments(), seed=seeds)
def test_full_rank_without_bound_is_the_dense_convolution(drawn, seed):
    torch.manual_seed(seed)
    d, args, space = drawn
    ours, theirs = PAIRS[d]
    dense = theirs(**args, **F64)
    layer = ours.from_dense(dense, limit(args, d), tau=None)
    back = layer.to_dense()
    assert type(back) is theirs
    torch.testing.assert_close(back.weight, dense.weight, rtol=1e-11, atol=1e-11)
    assert torch.equal(back.bias, dense.bias) if args["bias"] else back.bias is None
    assert repr(back) == repr(dense)
    x = torch.randn(2, args["in_channels"], *space, **F64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-10, atol=1e-10)


@given(drawn=arguments(), tau=taus, seed=seeds)
def test_from_dense_takes_the_nearest_matrix_of_each_group(drawn, tau, seed):
    torch.manual_seed(seed)
    d, args, _ = drawn
    ours, theirs = PAIRS[d]
    dense, rank = theirs(**args, **F64), (limit(args, d) + 1) // 2
    layer = ours.from_dense(dense, rank, tau=tau)
    blocks = matricised(layer, dense.weight.detach())
    expected = torch.stack([layer.manifold.to_dense(layer.manifold.from_dense(B)) for B in blocks])
    found = matricised(layer, layer.dense_weight().detach())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    lead = (args["groups"],) if args["groups"] > 1 else ()
    assert layer.weight.shape == (*lead, *layer.manifold.point_shape)


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_gradcheck(device, d, mode):
    layer = PAIRS[d][0](
        4, 6, 2, 2, padding="same", groups=2, padding_mode=mode, device=device, **F64
    )
    x = torch.randn(1, 4, *(3,) * d, device=device, **F64).requires_grad_()
    params = {k: p.detach().clone().requires_grad_() for k, p in layer.named_parameters()}

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(params, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *params.values()))


@pytest.mark.parametrize("kernel", [2, 4, (2, 3), (4, 1)])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_even_kernels_with_same_padding(kernel, mode):
    args = {"padding": "same", "dilation": 2, "padding_mode": mode, **F64}
    dense = nn.Conv2d(2, 5, kernel, **args)
    layer = LowRankConv2d.from_dense(dense, 2, tau=None)
    x = torch.randn(1, 2, 9, 8, **F64)
    assert layer(x).shape == (1, 5, 9, 8)
    torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_channels_last_is_kept(device, mode):
    layer = LowRankConv2d(8, 12, 3, 4, padding=1, padding_mode=mode, device=device)
    x = torch.randn(2, 8, 6, 7, device=device)
    y = layer(x.to(memory_format=torch.channels_last))
    dense = layer.to_dense()(x.to(memory_format=torch.channels_last))
    last = {"memory_format": torch.channels_last}
    assert y.is_contiguous(**last) == dense.is_contiguous(**last)
    if mode == "zeros":
        assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


def test_a_module_moved_to_channels_last_computes_the_same():
    layer = LowRankConv2d(4, 6, 3, 2, groups=2)
    x = torch.randn(2, 4, 6, 6)
    before = layer(x)
    layer.to(memory_format=torch.channels_last)
    assert isinstance(layer.weight, geoopt.ManifoldParameter)
    assert layer.weight.manifold is layer.manifold
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision(device, dtype):
    layer = LowRankConv2d(4, 6, 3, 2, groups=2, device=device)
    x = torch.randn(2, 4, 8, 8, device=device)
    with torch.autocast(device.type, dtype=dtype):
        y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == dtype
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_device(device, dtype):
    layer = LowRankConv2d(4, 6, 3, 3, groups=2, device=device, dtype=dtype)
    y = layer(torch.randn(2, 4, 8, 8, device=device, dtype=dtype))
    assert y.dtype == layer.weight.dtype == dtype
    assert y.device.type == device.type
    assert layer.manifold.check_point_on_manifold(layer.weight.detach(), atol=3e-2)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_layers_without_storage(d):
    layer = PAIRS[d][0](4, 6, 3, 2, groups=2, device="meta")
    x = torch.empty(2, 4, *(8,) * d, device="meta")
    assert layer(x).shape == (2, 6, *(6,) * d)
    assert layer.to_dense()(x).shape == (2, 6, *(6,) * d)
    assert layer.weight.manifold is layer.manifold


# -- errors and words


@pytest.mark.parametrize("rank", [0, 4])
def test_ranks_out_of_range_raise_with_value_and_bound(rank):
    for args, bound in (((3, 3, 3), 3), ((4, 6, 3, ..., 1, 0, 1, 2), 3), ((1, 8, (3, 1)), 3)):
        values = [rank if a is ... else a for a in args]
        if ... not in args:
            values.append(rank)
        with pytest.raises(ValueError, match=rf"min\(m, n\) = {bound}, got {rank}"):
            LowRankConv2d(*values)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"groups": 2}, "divisible by groups"),
        ({"padding_mode": "wrap"}, "padding_mode must be one of .* got .*wrap"),
        ({"padding": "full"}, "Invalid padding string 'full'"),
        ({"stride": 2, "padding": "same"}, "strided"),
    ],
)
def test_bad_arguments_are_refused_as_by_torch(bad, match):
    for build in (nn.Conv2d, lambda *a, **k: LowRankConv2d(*a, 2, **k)):
        with pytest.raises(ValueError, match=match):
            build(3, 6, 3, **bad)


def test_from_dense_refuses_another_dimension():
    with pytest.raises(TypeError, match="module must be a Conv1d, got a module of class Conv2d"):
        LowRankConv1d.from_dense(nn.Conv2d(3, 3, 3), 2)
    with pytest.raises(
        TypeError, match="module must be a Conv2d, got a module of class ConvTranspose2d"
    ):
        LowRankConv2d.from_dense(nn.ConvTranspose2d(3, 3, 3), 2)


def test_repr_names_what_is_not_default():
    layer = LowRankConv2d(4, 6, 3, 2, (2, 1), 1, 1, 2, False, "circular", tau=None)
    assert layer.extra_repr() == (
        "4, 6, kernel_size=(3, 3), stride=(2, 1), padding=(1, 1), groups=2, bias=False, "
        "padding_mode='circular', rank=2, tau=None, compression=14.8%"
    )
    assert "padding='same'" in repr(LowRankConv1d(4, 6, 3, 2, padding="same"))
    assert "dilation=(2, 2)" in repr(LowRankConv2d(4, 6, 3, 2, dilation=2))


def test_flags_are_kept_and_random_init_keeps_the_bias():
    dense = nn.Conv2d(4, 6, 3, groups=2).eval()
    dense.weight.requires_grad_(False)
    for init in ("svd", "random"):
        layer = LowRankConv2d.from_dense(dense, 2, tau=0.0, init=init)
        for module in (layer, layer.to_dense()):
            assert not module.training
            assert not module.weight.requires_grad
            assert module.bias.requires_grad
            assert torch.equal(module.bias, dense.bias)
    assert layer.tau == 0.0


def test_groups_keep_their_own_bound():
    """Groups of very different size must not be projected together."""
    dense = nn.Conv2d(4, 6, 1, groups=2, **F64)
    with torch.no_grad():
        dense.weight[3:] *= 1e3
    layer = LowRankConv2d.from_dense(dense, 2, tau=0.1)
    s = layer.manifold.svdvals(layer.weight.detach())
    assert s.shape == (2, 2)
    assert float((s[:, 0] / s[:, 1]).max()) <= 1.1 * (1 + 1e-9)
    assert float(s[1, 0] / s[0, 0]) > 50
    assert isinstance(layer.manifold, lrm.WellConditioned)


def test_the_version_of_a_dense_layer_in_a_state_dict_changes_no_weight():
    """As in one of a dense model that was filled up with the low-rank layers' tensors."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, (3, 2), groups=2))
    source, again = (lrm.factorize(copy.deepcopy(dense), rank=2) for _ in range(2))
    state = dense.state_dict()
    assert state._metadata["0"]["version"] == 1
    with torch.no_grad():
        source[0].weight.copy_(source[0].manifold.random(*source[0].weight.shape))
    state.update(source.state_dict())
    again.load_state_dict(state)
    for i in (0, 2):
        assert torch.equal(again[i].weight, source[i].weight)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("channels", [1, 4])
def test_the_layout_of_the_output_is_that_of_the_dense_convolution(last, mode, kernel, channels):
    options = {"padding": kernel // 2, "padding_mode": mode}
    format = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, channels, 6, 6).contiguous(memory_format=format)
    layer = LowRankConv2d(channels, 8, kernel, 1, **options)
    dense = nn.Conv2d(channels, 8, kernel, **options)
    assert layer(x).stride() == dense(x).stride()
