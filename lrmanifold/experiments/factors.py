"""The plain low-rank layer that CondLR is compared with: two free factors, no geometry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..nn import LowRankLayer
from ..nn.exchange import exchanged
from ..nn.kinds import kind_of
from ..nn.plan import make_plan
from ..nn.two_factors import TwoFactors

__all__ = ["Rank", "TwoFactors", "spectrum", "two_factors"]

Rank = int | float | Mapping[str, int | float]


def two_factors(model: nn.Module, rank: Rank, **patterns: Any) -> nn.Module:
    """Replace each layer by :class:`TwoFactors`, in place.

    Starts balanced from the truncated SVD, A = U √Σ, B = V √Σ. The layers and ranks are those that
    :func:`lrmanifold.factorize` chooses for the same arguments.

    Returns
    -------
    nn.Module
        `model`; if `model` is itself such a layer, its two factors.

    Raises
    ------
    TypeError
        If `model` is no module.
    ValueError
        Before anything changes, for chosen layers other than linear ones and convolutions without
        groups.
    """
    plan = make_plan(model, rank=rank, **patterns)
    modules = dict(model.named_modules())
    chosen = [(d.name, d.rank) for d in plan.decisions if d.rank is not None]
    for name, _ in chosen:
        parts = name.rpartition(".")[0], name
        for part, module in ((part, modules.get(part)) for part in parts):
            attention = isinstance(module, nn.MultiheadAttention)
            if attention or (part == name and not _can_be_two(module)):
                raise ValueError(
                    "two_factors takes linear layers and convolutions that are neither transposed "
                    f"nor have groups, got {_kind(module)} at {part!r}: leave it out by exclude"
                )
    new = {id(modules[name]): _pair(modules[name], r) for name, r in chosen}
    return exchanged(model, new)


def _kind(module: Any) -> str:
    groups = getattr(module, "groups", 1)
    return type(module).__name__ + (f" with {groups} groups" if groups > 1 else "")


def _can_be_two(module: nn.Module | None) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def _pair(module: Any, rank: int) -> TwoFactors:
    factory = {"device": module.weight.device, "dtype": module.weight.dtype}
    biased = module.bias is not None
    if isinstance(module, nn.Linear):
        first: Any = nn.Linear(module.in_features, rank, bias=False, **factory)
        second: Any = nn.Linear(rank, module.out_features, bias=biased, **factory)
    else:
        kind: Any = kind_of(module)
        first = kind(
            module.in_channels,
            rank,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            bias=False,
            padding_mode=module.padding_mode,
            **factory,
        )
        second = kind(rank, module.out_channels, 1, bias=biased, **factory)
    U, s, Vh = linalg.svd(module.weight.detach().flatten(1).double())
    root = s[:rank].sqrt()
    with torch.no_grad():
        first.weight.copy_((root[:, None] * Vh[:rank]).reshape(first.weight.shape))
        second.weight.copy_((U[:, :rank] * root).reshape(second.weight.shape))
        if biased:
            second.bias.copy_(module.bias)
            second.bias.requires_grad_(module.bias.requires_grad)
    for part in (first, second):  # what is frozen stays so, as in factorize
        part.weight.requires_grad_(module.weight.requires_grad)
    return TwoFactors(first, second)


def drawable(spectra: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a logarithmic picture can show: factors that decay away have singular values 0."""
    return {k: s for k, s in spectra.items() if all(0 < v < math.inf for row in s for v in row)}


def spectrum(layer: nn.Module) -> Tensor | None:
    """Singular values (groups, r) of a low-rank layer's weight, of the product for two factors.

    None for every other module.
    """
    if isinstance(layer, LowRankLayer):
        return layer.manifold.svdvals(layer.weight.detach()).reshape(-1, layer.rank)
    if isinstance(layer, TwoFactors):
        return layer.svdvals()[None]
    return None
