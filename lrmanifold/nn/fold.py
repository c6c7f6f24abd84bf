"""Low-rank layers for inference: two factors, in torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ._carry import take_marks
from ._folded import (
    FoldedConv,
    FoldedConvTranspose,
    FoldedEmbedding,
    FoldedLinear,
    FoldedTransposed,
)
from ._obstacles import check_model
from ._replace import replace_low_rank
from .conv import _LowRankConvNd
from .conv_transpose import _LowRankConvTransposeNd
from .embedding import LowRankEmbedding
from .layer import LowRankLayer
from .linear import LowRankLinear
from .transposed import LowRankTransposedLinear


def fold(model: nn.Module) -> nn.Module:
    """Replace every low-rank layer by two of torch's, with the core folded in, in place.

    U S Vᵀ becomes the pair (U S), V: an ``nn.Sequential`` of two ``nn.Linear``, r outputs without
    bias and then m, or of two convolutions, r filters (for each group) and then 1 x 1; a transposed
    convolution the other way round; a table of embeddings a table of r numbers a word and an
    ``nn.Linear``. The projections of an attention are folded one by one. That has
    (m + n) r weights a layer instead of (m + r + n) r, one product less, and its state dict loads
    into plain ``nn.Sequential`` pairs: for export and for deployment where the model has to stay
    small. The pair still answers ``weight`` (the product, formed when it is asked for), ``bias``,
    ``in_features`` or ``in_channels``, for code that reads them. For one product a layer,
    :func:`lrmanifold.densify` is the alternative; it is faster where r > m n/(m + n). Both have the
    function of the model to rounding. To train further keep the model itself: the folded factors
    are on no manifold.

    Biases are taken themselves, layers with a common weight get common factors, and hooks, buffers
    and attributes that somebody added go on to the pair. A layer that cannot be replaced whole (its
    bias is computed by a hook, or a module reads its factors, say) is left alone, and a warning
    names it. What :func:`~lrmanifold.nn.adapt` has frozen stays frozen.

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
        If `model` is no module, or holds a low-rank layer of a kind that cannot be folded.
    ValueError
        If `model` is wrapped for many processes already, or scripted.
    """
    check_model("model", model)
    return replace_low_rank(model, _folded, _tie, "fold", needs_bias=True)


def _tie(new: Any, first: Any) -> None:
    for mine, other in zip(new, first, strict=True):
        mine.weight = other.weight


def _folded(layer: LowRankLayer) -> nn.Module:
    wide_filters: Callable[[Tensor], Tensor] = _as_it_is
    if isinstance(layer, LowRankLinear):
        kind: Any = FoldedTransposed if isinstance(layer, LowRankTransposedLinear) else FoldedLinear
        pair, thin = _linear_pair(layer), _transposed
    elif isinstance(layer, _LowRankConvNd):
        kind, pair, thin = FoldedConv, _convolution_pair(layer), layer._filters
    elif isinstance(layer, _LowRankConvTransposeNd):
        kind, pair = FoldedConvTranspose, _transposed_pair(layer)
        thin, wide_filters = _transposed, layer._filters
    elif isinstance(layer, LowRankEmbedding):
        return _embedding_pair(layer)
    else:
        raise TypeError(
            f"a {type(layer).__name__} cannot be folded: only linear layers, convolutions and "
            "tables of embeddings can"
        )
    first, last = pair
    wide = linalg.compute_dtype(layer.weight.dtype)
    with torch.no_grad():
        U, S, V = layer.manifold.unpack(layer.weight.detach().to(wide))
        first.weight.copy_(thin(V).reshape(first.weight.shape))
        last.weight.copy_(wide_filters(U @ S).reshape(last.weight.shape))
        if layer.bias is not None:
            last.bias.copy_(layer.bias)
            last.bias.requires_grad_(layer.bias.requires_grad)
    for part in pair:
        part.weight.requires_grad_(layer.weight.requires_grad)
        take_marks(part.weight, layer.weight)
    return kind(*pair).train(layer.training)


def _transposed(V: Any) -> Any:
    return V.mT


def _as_it_is(US: Tensor) -> Tensor:
    return US


def _embedding_pair(layer: LowRankEmbedding) -> nn.Module:
    factory: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    M = layer.manifold
    table = nn.Embedding(M.m, M.rank, layer.padding_idx, **factory)
    last = nn.Linear(M.rank, M.n, bias=False, **factory)
    wide = linalg.compute_dtype(layer.weight.dtype)
    with torch.no_grad():
        U, S, V = M.unpack(layer.weight.detach().to(wide))
        table.weight.copy_(U @ S)
        last.weight.copy_(V)
    for part in (table, last):
        part.weight.requires_grad_(layer.weight.requires_grad)
        take_marks(part.weight, layer.weight)
    return FoldedEmbedding(table, last).train(layer.training)


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


def _transposed_pair(layer: _LowRankConvTransposeNd) -> tuple[Any, Any]:
    factory: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    dense: Any = layer._dense_class
    plain: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(layer.kernel_size)]
    inner = layer.groups * layer.rank
    first = plain(layer.in_channels, inner, 1, groups=layer.groups, bias=False, **factory)
    last = dense(
        inner,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.output_padding,
        layer.groups,
        layer.bias is not None,
        layer.dilation,
        layer.padding_mode,
        **factory,
    )
    return first, last
