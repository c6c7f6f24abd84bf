"""Many small low-rank weights of one shape, moved as one batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..manifolds import FixedRank
from ..manifolds._packing import unpack
from ._factored import MOMENTUM_STATE, Momentum, Options, Workspace, factored_step, is_factored

# Flops of a step below which its calls take longer than its work: the weights are copied into one
# tensor and back, which large ones pay for (benchmarks/speed, `step`).
_SMALL = 1_000_000


def bundle_key(manifold: Any, p: Tensor, state: dict[str, Any]) -> Hashable | None:
    """What weights must have in common to move together; None for one that goes alone.

    On an accelerator, where every call is a launch, single weights of any size move together.
    """
    if not is_factored(manifold) or p.ndim > 2 or p.dtype != linalg.compute_dtype(p.dtype):
        return None
    if p.device.type == "cpu" and 8 * p.shape[0] * p.shape[1] ** 2 > _SMALL:
        return None
    bound = getattr(manifold, "tau", None), getattr(manifold, "centre", None)
    shape = manifold.m, manifold.n, manifold.rank, p.dtype, p.device
    return (
        type(manifold),
        manifold.gradient,
        *bound,
        *shape,
        *(k in state for k in MOMENTUM_STATE),
    )


def step_together(
    manifold: FixedRank,
    params: Sequence[Tensor],
    grads: Tensor,
    states: Sequence[dict[str, Any]],
    options: Options,
    ok: Tensor | None,
) -> Tensor | None:
    """Move all weights of a bundle; returns where, or None for everywhere.

    Parameters
    ----------
    manifold : FixedRank
        Of any of them.
    params : sequence of Tensor
    grads : Tensor, shape (k, m + r + n, r)
    states : sequence of dict
    options : Options
    ok : Tensor, shape (k,), or None
        On an accelerator that skips, which gradients were finite.

    Raises
    ------
    ValueError, torch.linalg.LinAlgError
        On the CPU, if one of the steps is too long to be made; nothing is written then.
    """
    points = [p.detach() for p in params]
    X, G = (unpack(x, manifold.m, manifold.n) for x in (torch.stack(points), grads))
    step = factored_step(manifold, X, G, _stacked(states, options), options, Workspace())
    Y = step.packed()
    if ok is None:
        if Y.device.type == "cpu" and not linalg.all_finite(Y):
            raise ValueError("it overflows")
    else:
        ok = ok & torch.isfinite(Y).flatten(1).all(1)
        Y = torch.where(ok[:, None, None], Y, torch.stack(points))
    torch._foreach_copy_(points, list(Y.unbind()))
    for key, value in zip(MOMENTUM_STATE, step.momentum or (None,) * 3, strict=True):
        if value is None:
            for state in states:
                state.pop(key, None)
            continue
        if ok is not None:
            none = torch.zeros_like(value[0])
            old = torch.stack([state.get(key, none) for state in states])
            value = torch.where(ok.reshape(-1, *(1,) * (value.ndim - 1)), value, old)
        for state, part in zip(states, value.unbind(), strict=True):
            state[key] = part
    return ok


def _stacked(states: Sequence[dict[str, Any]], options: Options) -> Momentum | None:
    if not options.momentum or MOMENTUM_STATE[0] not in states[0]:
        return None
    kept = {}
    for name, key in zip(Momentum._fields, MOMENTUM_STATE, strict=True):
        if key in states[0]:
            kept[name] = torch.stack([state[key] for state in states])
    return Momentum(**kept)
