"""The plain low-rank layer that CondLR is compared with: two free factors, no geometry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..nn import LowRankLayer
from ..nn.kinds import kind_of
from ..nn.plan import make_plan
from ..nn.two_factors import TwoFactors

__all__ = ["Rank", "TwoFactors", "spectrum", "two_factors"]

Rank = int | float | Mapping[str, int | float]


def two_factors(model: nn.Module, rank: Rank, **patterns: Any) -> nn.Module:
    """Replace each layer by :class:`TwoFactors`, in place.

    Starts balanced from the truncated SVD, A = U √Σ, B = V √Σ. The layers and ranks are those that
    :func:`lrmanifold.factorize` chooses for the same arguments.
    """
    plan = make_plan(model, rank=rank, **patterns)
    for decision in plan.decisions:
        if decision.rank is not None:
            parent, _, child = decision.name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, _pair(getattr(owner, child), decision.rank))
    return model


def _pair(module: Any, rank: int) -> TwoFactors:
    factory = {"device": module.weight.device, "dtype": module.weight.dtype}
    biased = module.bias is not None
    if isinstance(module, nn.Linear):
        first: Any = nn.Linear(module.in_features, rank, bias=False, **factory)
        second: Any = nn.Linear(rank, module.out_features, bias=biased, **factory)
    else:
        if module.groups != 1:
            raise ValueError(f"two_factors takes convolutions without groups, got {module}")
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
    return TwoFactors(first, second)


def spectrum(layer: nn.Module) -> Tensor | None:
    """Singular values (groups, r) of a low-rank layer's weight, of the product for two factors.

    None for every other module.
    """
    if isinstance(layer, LowRankLayer):
        return layer.manifold.svdvals(layer.weight.detach()).reshape(-1, layer.rank)
    if isinstance(layer, TwoFactors):
        return layer.svdvals()[None]
    return None
