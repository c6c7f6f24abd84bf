"""Low-rank layers for inference: two factors, in torch's own layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import linalg
from .adapter import LowRankAdapter
from .conv import _LowRankConvNd
from .factorize import _replace
from .layer import LowRankLayer
from .linear import LowRankLinear


def fold(model: nn.Module) -> nn.Module:
    """Replace every low-rank layer by two of torch's, with the core folded in, in place.

    U S Vᵀ becomes the pair (U S), V: an ``nn.Sequential`` of two ``nn.Linear``, r outputs without
    bias and then m, or of two convolutions, r filters (for each group) and then 1 x 1. That has
    (m + n) r weights a layer instead of (m + r + n) r, one product less, and needs nothing of this
    library: for export and for deployment where the model has to stay small. For one product a
    layer, :func:`lrmanifold.densify` is the alternative; it is faster where r > m n/(m + n). Both
    have the function of the model to rounding. To train further keep the model itself: the folded
    factors are on no manifold.

    Parameters
    ----------
    model : nn.Module
        An adapter in it is merged into its dense layer.

    Returns
    -------
    nn.Module
        `model`; if `model` is itself a low-rank layer, the pair.
    """
    adapters = [module for module in model.modules() if isinstance(module, LowRankAdapter)]
    replacements: dict[int, nn.Module] = {id(module): module.merge() for module in adapters}
    inner = {id(module.update) for module in adapters}
    for module in model.modules():
        if isinstance(module, LowRankLayer) and id(module) not in inner:
            replacements[id(module)] = _folded(module)
    return _replace(model, replacements)


def _folded(layer: LowRankLayer) -> nn.Module:
    if isinstance(layer, LowRankLinear):
        pair, filters = _linear_pair(layer), _transposed
    elif isinstance(layer, _LowRankConvNd):
        pair, filters = _convolution_pair(layer), layer._filters
    else:
        raise TypeError(
            f"a {type(layer).__name__} cannot be folded: only linear layers and convolutions can"
        )
    first, last = pair
    wide = linalg.compute_dtype(layer.weight.dtype)
    with torch.no_grad():
        U, S, V = layer.manifold.unpack(layer.weight.detach().to(wide))
        first.weight.copy_(filters(V))
        last.weight.copy_((U @ S).reshape(last.weight.shape))
        if layer.bias is not None:
            last.bias.copy_(layer.bias)
            last.bias.requires_grad_(layer.bias.requires_grad)
    for part in pair:
        part.weight.requires_grad_(layer.weight.requires_grad)
    return nn.Sequential(*pair).train(layer.training)


def _transposed(V: Any) -> Any:
    return V.mT


def _linear_pair(layer: LowRankLinear) -> tuple[Any, Any]:
    factory: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    M = layer.manifold
    return (
        nn.Linear(M.n, M.rank, bias=False, **factory),
        nn.Linear(M.rank, M.m, bias=layer.bias is not None, **factory),
    )


def _convolution_pair(layer: _LowRankConvNd) -> tuple[Any, Any]:
    factory: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    make: Any = layer._dense_class
    inner = layer.groups * layer.rank
    first = make(
        layer.in_channels,
        inner,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        False,
        layer.padding_mode,
        **factory,
    )
    bias = layer.bias is not None
    last = make(inner, layer.out_channels, 1, groups=layer.groups, bias=bias, **factory)
    return first, last
