"""What is no forward pass keeps the precision of the weight within autocast."""

from __future__ import annotations

import copy

import geoopt
import pytest
import torch
from small_nets import drift
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold import linalg
from lrmanifold.optim import CondLR


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    dense = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12))
    return lrm.factorize(dense, rank=4, tau=0.1, keep_larger=True)


def within(function):
    with torch.autocast("cpu", torch.bfloat16):
        return function()


def trained(parts, model: nn.Module) -> CondLR:
    optimizer = CondLR([p for p in parts if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    return optimizer


def test_measurements_are_those_without_autocast():
    model = network()
    assert within(lambda: lrm.report(model).layers) == lrm.report(model).layers
    M, X = model[0].manifold, model[0].weight.detach()
    assert within(lambda: M.check_point_on_manifold(X, atol=1e-5, rtol=1e-5))
    assert torch.equal(within(lambda: M.projx(X)), M.projx(X))
    stiefel, Q = lrm.Stiefel(), torch.randn(9, 4)
    assert torch.equal(within(lambda: stiefel.projx(Q)), stiefel.projx(Q))


@pytest.mark.parametrize(
    "manifold",
    [
        lrm.FixedRank(40, 30, 4),
        lrm.WellConditioned(40, 30, 4, tau=0.1),
        lrm.WellConditioned(40, 30, 4, tau=0.1, scale=2.0),
        lrm.Stiefel(),
    ],
)
def test_random_points_are_points(manifold):
    size = getattr(manifold, "point_shape", (40, 4))
    draw = lambda: manifold.random(*size, generator=torch.Generator().manual_seed(0))  # noqa: E731
    assert torch.equal(within(draw), draw())


KERNELS = {
    "orthonormalize": linalg.orthonormalize,
    "polar": linalg.polar,
    "polar_decomposition": lambda A: linalg.polar_decomposition(A)[1],
    "polar_with_root": lambda A: linalg.polar_with_root(A)[1],
    "gram": linalg.gram,
    "solve_right": lambda A: linalg.solve_right(A, A[:5]),
    "spectral_clip": lambda A: linalg.spectral_clip(A[:5], 0.1),
    "spectral_clip, tau = 0": lambda A: linalg.spectral_clip(A[:5], 0.0),
    "condition_bound": lambda A: linalg.condition_bound(linalg.polar(A[:5]) + 0.01 * A[:5]),
    "conditioning_penalty": lambda A: linalg.conditioning_penalty(A[:5]),
    "conditioning_penalty_grad": lambda A: linalg.conditioning_penalty_grad(A[:5]),
    "gram_norm": linalg.gram_norm,
    "damped_polar": lambda A: linalg.damped_polar(A / 20.0, 0.1),
    "damped_polar_by_products": lambda A: linalg.damped_polar_by_products(A / 20.0, 0.1),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compute_as_without_autocast(name):
    A = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(within(lambda: KERNELS[name](A)), KERNELS[name](A))


def test_weights_that_are_loaded_are_points():
    model = network()
    within(lambda: model.load_state_dict(network(1).bfloat16().state_dict()))
    assert drift(model) <= 1e-5
    model.bfloat16()
    within(model.float)
    assert drift(model) <= 1e-5


@pytest.mark.parametrize("kind", [geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam])
def test_optimizers_of_geoopt_stay_on_the_manifold(kind):
    model, x = network(), torch.randn(8, 16)
    optimizer = kind(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()

    for _ in range(5):
        within(step)
    assert drift(model) <= 1e-5


def test_a_momentum_is_that_without_autocast():
    model = network()
    optimizer, p = trained(model.parameters(), model), model[0].weight
    assert torch.equal(within(lambda: optimizer.momentum(p)), optimizer.momentum(p))


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs: list[tuple[Tensor, Tensor]] = list(zip(a.parameters(), b.parameters(), strict=True))
    return all(torch.equal(p, q) for p, q in pairs)


def test_dense_layers_and_merged_adapters_have_the_same_weights():
    model = network()
    assert same(within(lambda: lrm.densify(copy.deepcopy(model))), lrm.densify(model))
    adapted = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12))
    lrm.nn.adapt(adapted, rank=2)
    trained(adapted.parameters(), adapted)
    other = copy.deepcopy(adapted)
    lrm.nn.merge(adapted)
    within(lambda: lrm.nn.merge(other))
    assert same(adapted, other)
    adapter = lrm.nn.LowRankAdapter(nn.Linear(16, 24), rank=2)
    trained(adapter.parameters(), adapter)
    assert same(within(adapter.merge), adapter.merge())
