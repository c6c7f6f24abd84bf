"""Layers of three ordinary parameters U, S, V: what the peers' geometries are put on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrmanifold.experiments.factors import TwoFactors
from lrmanifold.nn import LowRankConv2d, LowRankLayer, LowRankLinear

Constrain = Callable[["Factors"], None]


class Factors(nn.Module):
    """``y = U S Vᵀ x + b`` with U, S, V parameters of their own, started from one of our layers.

    The same products as in our layers: a linear layer is three thin ones, a convolution one with r
    filters and one of size 1 x 1.
    """

    def __init__(self, layer: LowRankLayer) -> None:
        super().__init__()
        self.U, self.S, self.V = (nn.Parameter(f.detach().clone()) for f in layer.factors)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        if not isinstance(layer, (LowRankLinear, LowRankConv2d)):
            raise TypeError(
                f"layer must be linear or a 2-d convolution, got {type(layer).__name__}"
            )
        self.convolution: tuple | None = None
        if isinstance(layer, LowRankConv2d):
            if layer.groups != 1 or layer.padding_mode != "zeros":
                raise ValueError(f"groups and padding modes are left out here, got {layer}")
            self.kernel = (*layer.kernel_size, layer.in_channels)
            self.convolution = (layer.stride, layer.padding, layer.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """As torch's layer."""
        # Each factor is read once: a parametrisation computes it at every access.
        U, S, V = self.U, self.S, self.V
        if self.convolution is None:
            return F.linear(F.linear(F.linear(x, V.mT), S), U, self.bias)
        filters = V.mT.contiguous().reshape(-1, *self.kernel).movedim(-1, 1)
        filters = filters.contiguous() if x.is_contiguous() else filters
        z = F.conv2d(x, filters, None, *self.convolution)
        return F.conv2d(z, (U @ S)[:, :, None, None], self.bias)


def with_factors(model: nn.Module, constrain: Constrain | None = None) -> nn.Module:
    """Replace our layers by :class:`Factors`, in place; `constrain` is then applied to each."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankLayer):
                factors = Factors(child)
                if constrain is not None:
                    with torch.no_grad():
                        constrain(factors)
                setattr(parent, name, factors)
    return model


def with_pairs(model: nn.Module) -> nn.Module:
    """Replace our layers by two free factors A = U S and Bᵀ = Vᵀ of torch's own kind, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LowRankLayer):
                setattr(parent, name, _pair(child))
    return model


def _pair(layer: LowRankLayer) -> TwoFactors:
    biased = layer.bias is not None
    first: nn.Module
    second: nn.Module
    if isinstance(layer, LowRankConv2d):
        spatial = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        first = nn.Conv2d(layer.in_channels, layer.rank, *spatial, bias=False)
        second = nn.Conv2d(layer.rank, layer.out_channels, 1, bias=biased)
    elif isinstance(layer, LowRankLinear):
        first = nn.Linear(layer.in_features, layer.rank, bias=False)
        second = nn.Linear(layer.rank, layer.out_features, bias=biased)
    else:
        raise TypeError(f"layer must be linear or a 2-d convolution, got {type(layer).__name__}")
    with torch.no_grad():
        U, S, V = layer.factors
        filters = layer._filters(V) if isinstance(layer, LowRankConv2d) else V.mT
        first.weight.copy_(filters)  # type: ignore[operator, union-attr]
        second.weight.copy_((U @ S).reshape(second.weight.shape))  # type: ignore[operator, union-attr]
        if layer.bias is not None:
            second.bias.copy_(layer.bias)  # type: ignore[operator, union-attr]
    return TwoFactors(first, second).to(layer.weight.device)


def tall_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Shapes (n, r) of the factors U and V of all our layers in a model."""
    layers = [m for m in model.modules() if isinstance(m, LowRankLayer)]
    return [size for L in layers for size in ((L.manifold.m, L.rank), (L.manifold.n, L.rank))]
