"""LowRankLinear against nn.Linear with the dense weight, and what its constructor accepts."""

from __future__ import annotations

import math

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SHAPES, seeds
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import lrmanifold as lrm
from lrmanifold.nn import LowRankLinear

taus = st.sampled_from([None, 0.0, 0.1, 2.0])
F64 = {"dtype": torch.float64}


def dense_twin(layer: LowRankLinear) -> nn.Linear:
    """torch's layer with the matrix U S Vᵀ, put together here."""
    U, S, V = (f.detach() for f in layer.factors)
    options = {"device": U.device, "dtype": U.dtype}
    dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, **options)
    with torch.no_grad():
        dense.weight.copy_(U @ S @ V.mT)
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense


# -- function and gradients


@given(
    shape=st.sampled_from(SHAPES),
    lead=st.sampled_from([(), (1,), (4,), (2, 3), (2, 1, 3), (0,), (2, 0)]),
    bias=st.booleans(),
    tau=taus,
    gradient=st.sampled_from(["factors", "probe"]),
    seed=seeds,
)
def test_output_and_all_gradients_are_those_of_the_dense_layer(
    device, shape, lead, bias, tau, gradient, seed
):
    torch.manual_seed(seed)
    m, n, r = shape
    layer = LowRankLinear(n, m, r, bias, tau=tau, gradient=gradient, device=device, **F64)
    dense = dense_twin(layer)
    x = torch.randn(*lead, n, device=device, **F64).requires_grad_()
    z = x.detach().clone().requires_grad_()
    y, expected = layer(x), dense(z)
    assert y.shape == (*lead, m)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-10)
    if bias:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-10, atol=1e-10)
    U, S, V = (f.detach() for f in layer.factors)
    g = layer.manifold.unpack(layer.weight.grad)
    G, core = dense.weight.grad, S if gradient == "factors" else torch.eye(r, **F64).to(S)
    expected_g = (G @ V @ core.mT, U.mT @ G @ V, G.mT @ U @ core)
    for ours, theirs in zip(g, expected_g, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    # Either way the Riemannian gradient is P_W G.
    xi = layer.manifold.egrad2rgrad(layer.weight.detach(), layer.weight.grad)
    torch.testing.assert_close(
        xi, layer.manifold.project_ambient(layer.weight.detach(), G), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(device, bias):
    layer = LowRankLinear(4, 5, 2, bias, device=device, **F64)
    x = torch.randn(3, 4, device=device, **F64).requires_grad_()
    params = {k: p.detach().clone().requires_grad_() for k, p in layer.named_parameters()}

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(params, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *params.values()))
    assert torch.autograd.gradgradcheck(f, (x, *params.values()))


def test_functional_transforms_compose(device):
    layer = LowRankLinear(4, 5, 2, device=device, **F64)
    params = {k: p.detach() for k, p in layer.named_parameters()}
    x = torch.randn(3, 4, device=device, **F64)

    def loss(params, x):
        return functional_call(layer, params, (x,)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(params, x)
    layer(x).square().sum().backward()
    for k, p in layer.named_parameters():
        torch.testing.assert_close(per_sample[k].sum(0), p.grad)
    jacobian = vmap(jacrev(layer))(x)
    torch.testing.assert_close(jacobian, layer.dense_weight().expand(3, -1, -1))
    assert isinstance(layer.weight, geoopt.ManifoldParameter)


def test_wrong_input_width_raises():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        LowRankLinear(4, 5, 2)(torch.ones(3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision(device, dtype):
    layer = LowRankLinear(16, 12, 4, device=device)
    x = torch.randn(8, 16, device=device)
    with torch.autocast(device.type, dtype=dtype):
        y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == dtype
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=5e-2, atol=5e-2)


# -- construction


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_ranks_out_of_range_raise_with_value_and_bound(rank):
    for sizes in ((5, 9), (9, 5)):
        with pytest.raises(ValueError, match=rf"rank must be in 1..min\(m, n\) = 5, got {rank}"):
            LowRankLinear(*sizes, rank)


@pytest.mark.parametrize("rank", [2.5, 2.0, True, "2", None, torch.tensor(2)])
def test_ranks_that_are_no_integers_raise(rank):
    with pytest.raises(TypeError, match=r"rank must be an integer in 1..min\(m, n\) = 5, got "):
        LowRankLinear(5, 9, rank)


@pytest.mark.parametrize("tau", [-0.1, float("inf"), float("nan")])
def test_tau_out_of_range_raises_with_its_value(tau):
    with pytest.raises(ValueError, match=rf"tau must be a finite number >= 0, got {tau}"):
        LowRankLinear(5, 4, 2, tau=tau)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_dtypes_that_are_not_real_floats_raise(dtype):
    with pytest.raises(TypeError, match=f"dtype must be one of .*, got {dtype}"):
        LowRankLinear(5, 4, 2, dtype=dtype)


@given(shape=st.sampled_from(SHAPES), tau=taus, seed=seeds)
def test_a_new_layer_is_a_point_of_its_manifold(device, shape, tau, seed):
    torch.manual_seed(seed)
    m, n, r = shape
    for dtype, tol in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        layer = LowRankLinear(n, m, r, tau=tau, device=device, dtype=dtype)
        assert layer.weight.dtype == layer.bias.dtype == dtype
        assert layer.weight.device.type == layer.bias.device.type == device.type
        assert isinstance(layer.weight, geoopt.ManifoldParameter)
        assert layer.weight.manifold is layer.manifold
        assert layer.weight.requires_grad
        assert layer.tau == tau
        assert layer.rank == r
        assert type(layer.manifold) is (lrm.FixedRank if tau is None else lrm.WellConditioned)
        X = layer.weight.detach().double()
        assert float(layer.manifold.drift(X)) <= tol
        # S = αI with the Frobenius norm that torch's default gives a dense weight: m/3.
        norm2 = float(layer.manifold.unpack(X).S.square().sum())
        assert norm2 == pytest.approx(m / 3, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)
        assert float(layer.bias.detach().abs().max()) <= 1 / math.sqrt(n) + 1e-2


def test_reset_parameters_follows_the_seed():
    layer = LowRankLinear(9, 7, 3)
    torch.manual_seed(5)
    layer.reset_parameters()
    first = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(first, layer.weight)
    torch.manual_seed(5)
    layer.reset_parameters()
    assert torch.equal(first, layer.weight)


def test_the_default_dtype_is_torchs():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert LowRankLinear(5, 4, 2).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_layers_without_storage():
    layer = LowRankLinear(9, 7, 3, device="meta")
    assert layer.weight.is_meta
    assert layer.weight.manifold is layer.manifold
    assert layer(torch.empty(5, 9, device="meta")).shape == (5, 7)
    dense = layer.to_dense()
    assert dense.weight.is_meta
    assert LowRankLinear.from_dense(dense, 2).weight.shape == (18, 2)


def test_repr_tells_rank_bound_and_compression():
    layer = LowRankLinear(20, 30, 4, tau=0.25)
    assert layer.extra_repr() == (
        "in_features=20, out_features=30, bias=True, rank=4, tau=0.25, compression=64.0%"
    )
    assert layer.compression == pytest.approx(1 - (30 + 4 + 20) * 4 / 600)
    assert "bias=False, rank=2, tau=None" in repr(LowRankLinear(5, 4, 2, False, tau=None))


# -- conversion


@given(shape=st.sampled_from(SHAPES), bias=st.booleans(), seed=seeds)
def test_full_rank_without_bound_is_the_dense_layer(device, shape, bias, seed):
    torch.manual_seed(seed)
    m, n, _ = shape
    dense = nn.Linear(n, m, bias, device=device, **F64)
    back = LowRankLinear.from_dense(dense, min(m, n), tau=None).to_dense()
    assert type(back) is nn.Linear
    torch.testing.assert_close(back.weight, dense.weight, rtol=1e-12, atol=1e-12)
    assert (back.bias is None) == (not bias)
    if bias:
        assert torch.equal(back.bias, dense.bias)


@given(shape=st.sampled_from(SHAPES), tau=taus, seed=seeds)
def test_from_dense_takes_the_nearest_matrix(shape, tau, seed):
    torch.manual_seed(seed)
    m, n, r = shape
    dense = nn.Linear(n, m, **F64)
    layer = LowRankLinear.from_dense(dense, r, tau=tau)
    U, s, Vh = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    kept = s[:r]
    if tau is not None and float(kept[0]) > (1 + tau) * float(kept[-1]):
        # The nearest spectrum in [t, (1 + tau) t]: t by brute force.
        t = torch.linspace(0.0, float(kept[0]), 20001, **F64)[:, None]
        candidates = torch.minimum(torch.maximum(kept, t), (1 + tau) * t)
        kept = candidates[(candidates - kept).square().sum(1).argmin()]
    expected = (U[:, :r] * kept) @ Vh[:r]
    torch.testing.assert_close(layer.dense_weight().detach(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize("requires_grad", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_flags(requires_grad, training):
    dense = nn.Linear(6, 5).train(training)
    for p, flag in zip(dense.parameters(), requires_grad, strict=True):
        p.requires_grad_(flag)
    layer = LowRankLinear.from_dense(dense, 2)
    for module in (layer, layer.to_dense()):
        assert module.training == training
        assert (module.weight.requires_grad, module.bias.requires_grad) == requires_grad
    assert not layer.to_dense().weight.grad_fn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_conversion_keeps_dtype_and_device(device, dtype):
    dense = nn.Linear(6, 5, device=device, dtype=dtype)
    layer = LowRankLinear.from_dense(dense, 5, tau=None)
    for module in (layer, layer.to_dense()):
        assert module.weight.dtype == module.bias.dtype == dtype
        assert module.weight.device.type == device.type
    error = (layer.to_dense().weight - dense.weight).abs().max()
    assert float(error.detach()) <= 8 * torch.finfo(dtype).eps


def test_random_init_keeps_the_bias_alone():
    dense = nn.Linear(6, 5)
    layer = LowRankLinear.from_dense(dense, 2, init="random")
    assert torch.equal(layer.bias, dense.bias)
    assert float((layer.dense_weight() - dense.weight).detach().abs().max()) > 1e-2


def test_conversion_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="init must be 'svd' or 'random', got 'zeros'"):
        LowRankLinear.from_dense(nn.Linear(6, 5), 2, init="zeros")
    with pytest.raises(TypeError, match="module must be a Linear, got a module of class Conv2d"):
        LowRankLinear.from_dense(nn.Conv2d(3, 3, 3), 2)
    with pytest.raises(ValueError, match="rank must be in"):
        LowRankLinear.from_dense(nn.Linear(6, 5), 6)
    dense = nn.Linear(6, 5)
    nn.init.zeros_(dense.weight)
    with pytest.raises(ValueError, match="must not be zero"):
        LowRankLinear.from_dense(dense, 2)
    with pytest.raises(ValueError, match="numerical rank 0"):
        LowRankLinear.from_dense(dense, 2, tau=None)
    nn.init.constant_(dense.weight, float("nan"))
    with pytest.raises(ValueError, match="must be finite"):
        LowRankLinear.from_dense(dense, 2)
