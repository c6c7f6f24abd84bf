"""Ready parameter groups."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._arguments import check_module, check_number, check_rate
from ..errors import GeometryError
from ..manifolds import FixedRank
from ..parameter import manifold_of


def param_groups(
    model: nn.Module, *, lr: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Named groups for an optimizer: low-rank, adapters, decayed, not decayed.

    Matrices and larger tensors are decayed; biases, norms and scalars (fewer than 2 dimensions) are
    not, nor are parameters on manifolds without a core, such as Stiefel. Decay on a low-rank weight
    acts on its core alone. Updates of adapters are never decayed: what they add to a frozen layer
    is the difference to where they started, which decay would not bring back to zero.

    Parameters
    ----------
    model : nn.Module
        Parameters that need no gradient are left out; shared ones are listed once.
    lr, weight_decay : float, optional
        Set on the groups; where None, the optimizer's defaults hold (0 for the group not decayed).

    Returns
    -------
    list of dict
        Keys ``name`` ("manifold", "adapter", "decay" or "no_decay") and ``params`` as (name,
        parameter) pairs. Groups without parameters are left out.

    Raises
    ------
    GeometryError
        If a low-rank layer's weight has lost its manifold.
    TypeError, ValueError
        If an argument has a wrong type or is out of range.
    """
    check_module("model", model)
    if lr is not None:
        lr = check_rate("lr", lr)  # type: ignore[assignment]
    if weight_decay is not None:
        weight_decay = check_number("weight_decay", weight_decay, low=0.0)
    for name, module in model.named_modules():
        owned = getattr(module, "manifold", None)
        weight = getattr(module, "weight", None)
        if owned is not None and weight is not None and manifold_of(weight) is None:
            raise GeometryError(
                f"{name}.weight (shape {tuple(weight.shape)}) has lost its manifold {owned.name}"
            )
    # by what they have: optimizers import no layers
    held: list[Any] = [m for m in model.modules() if hasattr(m, "change_scale")]
    changes = {id(change.update.weight) for change in held}
    buckets: dict[str, list] = {"manifold": [], "adapter": [], "decay": [], "no_decay": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        manifold = manifold_of(p)
        if isinstance(manifold, FixedRank):
            kind = "adapter" if id(p) in changes else "manifold"
        else:
            kind = "decay" if manifold is None and p.ndim >= 2 else "no_decay"
        buckets[kind].append((name, p))
    groups = []
    for kind, params in buckets.items():
        decay = 0.0 if kind in ("adapter", "no_decay") else weight_decay
        options = {"lr": lr, "weight_decay": decay}
        given = {key: value for key, value in options.items() if value is not None}
        groups.append({"name": kind, "params": params, **given})
    return [group for group in groups if group["params"]]
