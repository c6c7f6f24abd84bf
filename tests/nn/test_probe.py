"""``gradient="probe"``: gradients without the inverse of S, in layers and in dense weights."""

from __future__ import annotations

import itertools

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import packed_point, seeds
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from lrmanifold.optim import CondLR

DOUBLE = {"dtype": torch.float64, "tau": None}

LAYERS = {
    "linear": (lambda g: LowRankLinear(6, 5, 3, gradient=g, **DOUBLE), (4, 2, 6)),
    "linear, r = m": (lambda g: LowRankLinear(6, 3, 3, bias=False, gradient=g, **DOUBLE), (4, 6)),
    "conv1d": (
        lambda g: LowRankConv1d(4, 6, 3, 2, stride=2, padding=1, groups=2, gradient=g, **DOUBLE),
        (3, 4, 9),
    ),
    "conv2d": (
        lambda g: LowRankConv2d(3, 5, (3, 2), 4, stride=(1, 2), padding=1, gradient=g, **DOUBLE),
        (2, 3, 6, 5),
    ),
    "conv2d, same, reflect": (
        lambda g: LowRankConv2d(
            4, 4, 3, 2, padding="same", padding_mode="reflect", groups=2, gradient=g, **DOUBLE
        ),
        (2, 4, 5, 5),
    ),
    "conv3d": (
        lambda g: LowRankConv3d(2, 4, 2, 3, padding=1, dilation=2, gradient=g, **DOUBLE),
        (2, 2, 4, 4, 4),
    ),
}


def twins(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module, Tensor]:
    """The layer with probes, the same one with factor gradients, and an input."""
    torch.manual_seed(seed)
    build, shape = LAYERS[name]
    probe, factors = build("probe"), build("factors")
    X = packed_point(*(getattr(probe.manifold, k) for k in ("m", "n", "rank")),
                     tuple(probe.weight.shape[:-2]), 5.0, seed)  # fmt: skip
    for layer in (probe, factors):
        with torch.no_grad():
            layer.weight.copy_(X)
    factors.load_state_dict(probe.state_dict())
    return probe, factors, torch.randn(shape, dtype=torch.float64)


def dense_products(layer: nn.Module, loss) -> tuple[Tensor, ...]:
    """(GV, UᵀGV, GᵀU) from the dense gradient G of a loss of the dense layer."""
    dense = layer.to_dense()
    loss(dense).backward()
    G = layer.matricised(dense.weight.grad)
    U, _, V = oracles.split(layer.weight, layer.manifold.m, layer.manifold.n)
    return G @ V, U.mT @ G @ V, G.mT @ U


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_input_gradients_are_those_of_the_factors(name):
    probe, factors, x = twins(name)
    outputs, gradients = [], []
    for layer in (probe, factors):
        z = x.clone().requires_grad_()
        y = layer(z)
        y.square().sum().backward()
        outputs.append(y.detach()), gradients.append(z.grad)
    assert torch.equal(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(probe(x), outputs[0])


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_the_dense_gradient_times_the_bases(name):
    probe, _, x = twins(name)

    def loss(layer: nn.Module) -> Tensor:
        return torch.tanh(layer(x)).square().sum()

    loss(probe).backward()
    expected = dense_products(probe, loss)
    got = probe.manifold.unpack(probe.weight.grad)
    for block, product in zip(got, expected, strict=True):
        torch.testing.assert_close(block, product, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_both_routes_give_the_same_riemannian_gradient(name):
    probe, factors, x = twins(name)
    rgrads = []
    for layer in (probe, factors):
        torch.tanh(layer(x)).sum().backward()
        rgrads.append(layer.manifold.egrad2rgrad(layer.weight.detach(), layer.weight.grad))
    torch.testing.assert_close(*rgrads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_an_input_gradient_penalty_is_right_too(name):
    probe, _, x = twins(name)

    def penalty(layer: nn.Module) -> Tensor:
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(torch.tanh(layer(z)).sum(), z, create_graph=True)
        return g.square().sum()

    penalty(probe).backward()
    expected = dense_products(probe, penalty)
    for block, product in zip(probe.manifold.unpack(probe.weight.grad), expected, strict=True):
        torch.testing.assert_close(block, product, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_the_dense_weight_has_probe_gradients_as_well(name):
    probe, _, _ = twins(name)

    def loss(layer: nn.Module) -> Tensor:
        weight = layer.weight if not hasattr(layer, "manifold") else layer.dense_weight()
        return weight.square().square().sum()

    assert torch.equal(probe.dense_weight(), probe.to_dense().weight)
    loss(probe).backward()
    for block, product in zip(
        probe.manifold.unpack(probe.weight.grad), dense_products(probe, loss), strict=True
    ):
        torch.testing.assert_close(block, product, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv1d"])
def test_derivatives_by_the_input_pass_gradcheck(name):
    probe, _, x = twins(name)
    z = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(probe, (z,))
    assert torch.autograd.gradgradcheck(probe, (z,))


@given(cond=st.sampled_from([1e2, 1e4, 1e6]), seed=seeds)
def test_in_float32_the_probe_route_keeps_its_digits_at_any_condition_number(cond, seed):
    torch.manual_seed(seed)
    layer = LowRankLinear(24, 20, 6, bias=False, tau=None, gradient="probe")
    X = packed_point(20, 24, 6, (), cond, seed)
    with torch.no_grad():
        layer.weight.copy_(X)
    x, y = torch.randn(32, 24), torch.randn(32, 20)
    (layer(x) * y).sum().backward()
    xi = layer.manifold.egrad2rgrad(layer.weight.detach(), layer.weight.grad)
    G = y.double().mT @ x.double()
    exact = oracles.project(layer.weight, G, 20, 24)
    got = oracles.dense_tangent(layer.weight, xi, 20, 24)
    assert oracles.relative(got, exact) < 3e-6


def regression(layer: LowRankLinear, A: Tensor, steps: int, lr: float) -> list[float]:
    """Losses of ½ ‖W - A‖², of condition number 1: exact gradient steps never raise it."""
    optimizer, eye, losses = CondLR(layer.parameters(), lr=lr), torch.eye(A.shape[1]), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = 0.5 * (layer(eye).mT - A).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def layer_with(s: list[float], gradient: str) -> tuple[LowRankLinear, Tensor]:
    torch.manual_seed(0)
    A = torch.randn(12, 4) @ torch.randn(4, 9) / 6
    layer = LowRankLinear(9, 12, 4, bias=False, tau=None, gradient=gradient)
    with torch.no_grad():
        layer.factors.S.copy_(torch.diag(torch.tensor(s)))
    return layer, A


SINGULAR = [1.0, 0.5, 0.0, 0.0]
COND_1E6 = [1.0, 1e-2, 1e-4, 1e-6]


@pytest.mark.parametrize("s", [[0.0] * 4, SINGULAR, COND_1E6])
@pytest.mark.parametrize("lr", [0.1, 0.9])
def test_training_descends_from_a_core_that_is_singular_or_of_condition_1e6(s, lr):
    layer, A = layer_with(s, "probe")
    assert layer.manifold.check_point_on_manifold(layer.weight.detach())
    losses = regression(layer, A, 150, lr)
    assert losses[-1] < 1e-6 * losses[0]
    assert all(b <= a + 1e-10 for a, b in itertools.pairwise(losses))


def test_there_the_solve_route_goes_uphill_or_raises():
    layer, A = layer_with(COND_1E6, "factors")
    losses = regression(layer, A, 10, 0.9)
    assert max(losses) > 1.2 * losses[0]
    layer, A = layer_with(SINGULAR, "factors")
    with pytest.raises((FloatingPointError, lrm.GeometryError)):
        regression(layer, A, 1, 0.9)


def test_a_bound_and_probes_go_together():
    torch.manual_seed(0)
    layer = LowRankLinear(9, 12, 4, bias=False, tau=0.5, gradient="probe")
    other = LowRankLinear(9, 12, 4, bias=False, tau=0.5)
    other.load_state_dict(layer.state_dict())
    A = torch.randn(12, 9)
    for x in (layer, other):
        regression(x, A, 30, 0.3)
    torch.testing.assert_close(layer.dense_weight(), other.dense_weight(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gradient", ["none", None, True])
def test_an_unknown_gradient_is_refused(gradient):
    kind = ValueError if isinstance(gradient, str) else TypeError
    with pytest.raises(kind, match="gradient must be 'factors' or 'probe', got"):
        LowRankLinear(9, 12, 4, gradient=gradient)
