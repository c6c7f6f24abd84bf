"""Layers of each kind, what it means for one to be whole, and weights that none may take."""

from __future__ import annotations

from collections.abc import Callable

import geoopt
import torch
from torch import Tensor

from lrmanifold.nn import (
    LowRankConv2d,
    LowRankConvTranspose1d,
    LowRankLayer,
    LowRankLinear,
)
from lrmanifold.optim import CondLR

LAYERS: dict[str, Callable[..., LowRankLayer]] = {
    "linear": lambda **k: LowRankLinear(7, 9, 3, tau=0.1, **k),
    "linear without bound": lambda **k: LowRankLinear(7, 9, 3, tau=None, **k),
    "grouped convolution": lambda **k: LowRankConv2d(4, 6, 2, 2, groups=2, tau=0.0, **k),
    "transposed": lambda **k: LowRankConvTranspose1d(7, 3, 4, 3, stride=2, tau=0.1, **k),
}
# Of weights stored in these dtypes.
DRIFT = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def assert_whole(layer: LowRankLayer) -> None:
    """The weight is a parameter on the layer's manifold, near it, and trains there."""
    weight, M = layer.weight, layer.manifold
    assert isinstance(weight, geoopt.ManifoldParameter)
    assert weight is dict(layer.named_parameters())["weight"]
    assert weight.manifold is M
    assert weight.is_leaf
    drift = DRIFT[weight.dtype]
    assert float(M.drift(weight.detach().double()).max()) <= drift
    before, requires_grad = weight.detach().clone(), weight.requires_grad
    layer.requires_grad_(True)
    grads = [p.grad for p in layer.parameters()]
    optimizer = CondLR(layer.parameters(), lr=0.1, momentum=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        layer.dense_weight().float().square().sum().backward()
        optimizer.step()
    X = weight.detach().double()
    assert not torch.equal(before, weight.detach())
    assert float(M.drift(X).max()) <= drift
    if layer.tau is not None:
        assert float(M.cond(X).max()) <= (1 + layer.tau) * (1 + drift)
    with torch.no_grad():
        weight.copy_(before)
    layer.requires_grad_(requires_grad)
    for p, g in zip(layer.parameters(), grads, strict=True):
        p.grad = g


def off_manifold(X: Tensor) -> Tensor:
    return X + 0.3


def not_finite(X: Tensor) -> Tensor:
    return X * float("nan")


def ill_conditioned(X: Tensor) -> Tensor:
    X = X.clone()
    X.view(-1, *X.shape[-2:])[0, -8, :] *= 1e-3  # the last row of S, for n = 7 and n = 8
    return X


def transposed(X: Tensor) -> Tensor:
    return X.mT.contiguous()


def stacked(X: Tensor) -> Tensor:
    return torch.stack([X, X])


def cut(X: Tensor) -> Tensor:
    return X[..., :-1, :]


BAD = [off_manifold, not_finite, transposed, stacked, cut]
