"""Linear layers with adapters, to their bounds: the sum of the base's weight and the change."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..factors import unpack
from ..nn import (
    AdaptedLayer,
    Change,
    LowRankAdapter,
    LowRankLayer,
    LowRankLinear,
    LowRankTransposedLinear,
    bases,
)
from ._sizes import UP, frobenius
from .bounds import BoundError, Context, changed_method, computes_as, no_bound_words

ADAPTERS = (LowRankAdapter, AdaptedLayer)
LOW_RANK = (LowRankLinear, LowRankTransposedLinear)


def bare(module: Any) -> Any:
    """The layer that computes alone: an adapted one's base, unless a change is active."""
    while computes_as(module, (AdaptedLayer,)) and (module.active is None or module.merged):
        module = module.base_layer
    return module


def check_adapter(module: Any, context: Context) -> None:
    """Raise :class:`BoundError` for parts that do not compute with their weights as known."""
    held = change(module)
    parts = [(f"{context.name}.update", held.update)]
    if isinstance(module, AdaptedLayer):
        base = module.base_layer
        other = changed_method(held, Change) if isinstance(held, Change) else type(held).__name__
        if other is not None:
            raise BoundError(
                f"{context.name}: the active change has another function than a Change ({other}), "
                "so its weight does not say what it adds: take it out"
            )
        known = isinstance(base, LowRankLinear) or bases.plain_weight(base) is not None
        if not (isinstance(base, (nn.Linear, LowRankLinear)) and known):
            raise BoundError(
                f"{context.name}: the base of an adapter must be a Linear or LowRankLinear with a "
                f"weight of 16 bits or more, got a {type(base).__name__}: merge the adapter, or "
                "call lrmanifold.densify, where that is possible"
            )
        parts.append((f"{context.name}.base_layer", base))
    for name, part in parts:
        if not computes_as(part, (nn.Linear, *LOW_RANK)):
            raise BoundError(no_bound_words(part, name, (nn.Linear, *LOW_RANK)))


def change(module: Any) -> Any:
    """What holds the update: a LowRankAdapter itself, or the active change."""
    return module.changes[str(module.active)] if isinstance(module, AdaptedLayer) else module


def adapter_weight(module: Any) -> Tensor:
    """W + s (U S Vᵀ - U₀ S₀ V₀ᵀ) with gradients, not rounded to the dtype of W."""
    base: Any = module.base_layer if isinstance(module, AdaptedLayer) else None
    if base is None:
        W = module.base_weight
    elif isinstance(base, LowRankLayer):
        W = base.manifold.to_dense(base.weight)
    else:
        W = base.weight
    held = change(module)
    M = held.update.manifold
    # the start keeps its rank when that of the update changes
    now, start = held.update.factors, unpack(held.start, M.m, M.n)
    difference = now.U @ now.S @ now.V.mT - start.U @ start.S @ start.V.mT
    return W + held.change_scale * difference


def size_and_inner(module: Any) -> tuple[float, int]:
    """Of the terms of that sum: their Frobenius norms added up, and the inner dimensions."""
    held = change(module)
    M = held.update.manifold
    points = [(held.change_scale, unpack(X, M.m, M.n)) for X in (held.update.weight, held.start)]
    base: Any = module.base_layer if isinstance(module, AdaptedLayer) else None
    own = 0.0
    if base is None:
        own = frobenius(module.base_weight)
    elif isinstance(base, LowRankLayer):
        points.append((1.0, base.manifold.unpack(base.weight)))
    else:
        own = frobenius(base.weight)
    sizes = (abs(s) * frobenius(X.U) * frobenius(X.S) * frobenius(X.V) for s, X in points)
    ranks = [X.S.shape[-1] for _, X in points]
    inner = sum(ranks) + max(ranks) + 9
    return (own + sum(sizes)) * UP, inner
