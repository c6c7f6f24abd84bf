"""Low-rank layers for inference: two factors, in torch's own layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import linalg
from ._folded import FoldedConv, FoldedLinear
from ._obstacles import check_model
from ._replace import replace_low_rank
from .conv import _LowRankConvNd
from .layer import LowRankLayer
from .linear import LowRankLinear


def fold(model: nn.Module) -> nn.Module:
    """Replace every low-rank layer by two of torch's, with the core folded in, in place.

    U S Vᵀ becomes the pair (U S), V: an ``nn.Sequential`` of two ``nn.Linear``, r outputs without
    bias and then m, or of two convolutions, r filters (for each group) and then 1 x 1. That has
    (m + n) r weights a layer instead of (m + r + n) r, one product less, and its state dict loads
    into plain ``nn.Sequential`` pairs: for export and for deployment where the model has to stay
    small. The pair still answers ``weight`` (the product, formed when it is asked for), ``bias``,
    ``in_features`` or ``in_channels``, for code that reads them. For one product a layer,
    :func:`lrmanifold.densify` is the alternative; it is faster where r > m n/(m + n). Both have the
    function of the model to rounding. To train further keep the model itself: the folded factors
    are on no manifold.

    Biases are taken themselves, layers with a common weight get common factors, and hooks, buffers
    and attributes that somebody added go on to the pair. A layer that cannot be replaced whole (its
    bias is computed by a hook, say) is left alone, and a warning names it.

    Parameters
    ----------
    model : nn.Module
        An adapter in it is merged into its dense layer.

    Returns
    -------
    nn.Module
        `model`; if `model` is itself a low-rank layer, the pair.

    Raises
    ------
    TypeError
        If `model` is no module, or holds a low-rank layer that is neither linear nor a convolution.
    ValueError
        If `model` is wrapped for many processes already, or scripted.
    """
    check_model("model", model)
    return replace_low_rank(model, _folded, _tie, "fold", needs_bias=True)


def _tie(new: Any, first: Any) -> None:
    for mine, other in zip(new, first, strict=True):
        mine.weight = other.weight


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
    kind = FoldedLinear if isinstance(layer, LowRankLinear) else FoldedConv
    return kind(*pair).train(layer.training)


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
