"""Many small low-rank weights of one shape, moved as one batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..factors import unpack
from ..manifolds import FixedRank
from ._factored import MOMENTUM_STATE, Momentum, Options, Workspace, factored_step, is_factored

# Flops of a step below which its calls take longer than its work: the weights are copied into one
# tensor and back, which large ones pay for (benchmarks/speed, `step`).
_SMALL = 1_000_000


def bundle_key(
    manifold: Any, p: Tensor, state: dict[str, Any], names: tuple[str, ...] = MOMENTUM_STATE
) -> Hashable | None:
    """What weights must have in common to move together; None for one that goes alone.

    `names` are the entries of the state that a step needs. On an accelerator, where every call is
    a launch, single weights of any size move together.
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
        *(k in state for k in names),
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
    values = step.momentum or (None,) * len(MOMENTUM_STATE)
    state = dict(zip(MOMENTUM_STATE, values, strict=True))
    return write_together(params, states, step.packed(), state, ok)


def write_together(
    params: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    Y: Tensor,
    values: Mapping[str, Tensor | None],
    ok: Tensor | None,
) -> Tensor | None:
    """Write new points and states where they are finite; returns where, None for everywhere.

    Parameters
    ----------
    params, states : sequence of Tensor, of dict
        Of k weights.
    Y : Tensor, shape (k, m + r + n, r)
    values : mapping of Tensor, shape (k, ...)
        New entries of the states; None for those that are to go.
    ok : Tensor, shape (k,), or None
        See :func:`step_together`.

    Raises
    ------
    ValueError
        On the CPU, if anything is not finite; nothing is written then.
    """
    points, kept = [p.detach() for p in params], [v for v in values.values() if v is not None]
    if ok is None:
        if Y.device.type == "cpu" and not all(linalg.all_finite(x) for x in (Y, *kept)):
            raise ValueError("it overflows")
    else:
        for x in (Y, *kept):
            ok = ok & torch.isfinite(x).flatten(1).all(1)
        Y = torch.where(ok[:, None, None], Y, torch.stack(points))
    torch._foreach_copy_(points, list(Y.unbind()))
    for key, value in values.items():
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
