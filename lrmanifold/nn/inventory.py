"""What else holds parameters in a model: everything that is no matrix of a layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._obstacles import has_whole_weights
from .candidates import why_tables_stay
from .kinds import is_quantized, kind_of
from .layer import LowRankLayer

_LAZY = nn.parameter.UninitializedParameter
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_BIASES = frozenset({"bias", "in_proj_bias"})


@dataclass(frozen=True)
class Other:
    """Parameters of one module that stay as they are.

    Attributes
    ----------
    name, kind : str
        Qualified name of the module, and its class.
    weights : int
        How many parameters; those that an earlier module has, too, are not counted again.
    reason : str
        Why they stay.
    matrices : bool
        Whether any of them has two dimensions or more.
    rank : int or None
        Of a layer that is low-rank already.
    """

    name: str
    kind: str
    weights: int
    reason: str
    matrices: bool
    rank: int | None = None


def others_of(model: nn.Module, counted: Collection[int]) -> tuple[Other, ...]:
    """All parameters but those of the given ids, module by module.

    With `counted`, the sizes add up to those of ``model.parameters()``.
    """
    seen, found = set(counted), []
    tables = why_tables_stay(model)
    for name, module in model.named_modules():
        mine = {}
        for key, p in module._parameters.items():
            if p is not None and id(p) not in seen and not isinstance(p, _LAZY):
                seen.add(id(p))
                mine[key] = p
        if mine:
            size = sum(p.numel() for p in mine.values())
            matrices = any(p.ndim >= 2 for p in mine.values())
            low = isinstance(module, LowRankLayer) and "weight" in mine
            rank = module.rank if low else None  # type: ignore[union-attr]
            reason = tables.get(id(module)) or _reason(module, mine)
            found.append(Other(name, _kind(module), size, reason, matrices, rank))
    return tuple(found)


def _kind(module: nn.Module) -> str:
    kind = getattr(module, "original_name", None) or type(module).__name__
    # torch's own name for the output projection of attention says nothing to a reader
    return "Linear" if kind == "NonDynamicallyQuantizableLinear" else kind


def _reason(module: nn.Module, mine: dict[str, nn.Parameter]) -> str:
    if _BIASES.issuperset(mine):
        return "bias"
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted: its code is fixed"
    if all(p.ndim < 2 for p in mine.values()):
        return "vectors"
    if isinstance(module, _RECURRENT):
        return "recurrent: no low-rank layer for it"
    if isinstance(module, nn.MultiheadAttention):
        return "attention that stays dense"
    if isinstance(module, nn.Embedding):
        return "table of embeddings: include names it to factorize it"
    if isinstance(module, LowRankLayer):
        return "low-rank already"
    if not module._modules and type(module).__module__.startswith("torch."):
        return "no low-rank layer for it"
    names = ", ".join(list(mine)[:2]) + (", ..." if len(mine) > 2 else "")
    return f"parameters of its own: {names}"


def merged(rows: Iterable[Other]) -> list[Other]:
    """The same for a table: matrices one by one, vectors and biases together by kind."""
    found: dict[Any, list[Other]] = {}
    for row in rows:
        key = row.name if row.matrices else (row.kind, row.reason)
        found.setdefault(key, []).append(row)
    out = []
    for group in found.values():
        first = group[0]
        if len(group) == 1:
            out.append(first)
            continue
        size = sum(row.weights for row in group)
        out.append(Other(f"({len(group)} of them)", first.kind, size, first.reason, False))
    return sorted(out, key=lambda row: not row.matrices)


def unsupported(model: nn.Module) -> list[str]:
    """Kinds of modules that hold weights and cannot become low-rank, with how many weights."""
    found: dict[str, list[int]] = {}
    parts = {
        id(part)
        for module in model.modules()
        if type(module) is nn.MultiheadAttention and has_whole_weights(module)
        for part in module.modules()
    }
    for module in model.modules():
        if id(module) in parts:
            continue  # its projections have reasons of their own
        if kind_of(module) is type(module) and not isinstance(module, nn.Embedding):
            continue
        kind = _kind(module)
        if isinstance(module, torch.jit.ScriptModule):
            kind += ", scripted"
        elif isinstance(module, LowRankLayer):
            kind += ", low-rank already: densify it first"
        size = sum(
            p.numel()
            for p in module.parameters(recurse=False)
            if not isinstance(p, _LAZY) and p.ndim >= 2
        )
        if not size and is_quantized(module):  # torch's quantized layers
            kind, size = f"{kind}, quantized", int(module.weight().numel())  # type: ignore[operator, union-attr]
        if size:
            found.setdefault(kind, []).append(size)
    return [f"{len(n)} x {kind} ({sum(n):,} weights)" for kind, n in found.items()]
