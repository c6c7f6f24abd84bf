"""Which layers become low-rank, at which rank, and why the others stay dense."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from .._arguments import (
    check_flag,
    check_integer,
    check_module,
    check_number,
    check_patterns,
    check_text,
)
from ._obstacles import Obstacles
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .layer import LowRankLayer
from .linear import LowRankLinear

LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
}


_LAZY = nn.parameter.UninitializedParameter


@dataclass(frozen=True)
class Decision:
    """What becomes of one dense layer: its new `rank`, or None and the `reason` it stays dense."""

    name: str
    shape: tuple[int, int]
    groups: int
    rank: int | None
    reason: str

    @property
    def dense_weights(self) -> int:
        """Entries of the dense weight."""
        return self.groups * self.shape[0] * self.shape[1]

    @property
    def kept_weights(self) -> int:
        """Entries of the weight after the decision."""
        if self.rank is None:
            return self.dense_weights
        return packed_size(self.shape, self.rank, self.groups)


@dataclass(frozen=True)
class Plan:
    """Decisions for all dense layers of a model, in the order of its modules; prints as a table."""

    decisions: tuple[Decision, ...]
    other_weights: int

    @property
    def compression(self) -> float:
        """Share of the whole model's parameters that is removed."""
        before = self.other_weights + sum(d.dense_weights for d in self.decisions)
        after = self.other_weights + sum(d.kept_weights for d in self.decisions)
        return 1.0 - after / before if before else 0.0

    def __str__(self) -> str:
        rows = [("layer", "shape", "rank", "weights", "kept", "note")]
        for d in self.decisions:
            shape = f"{d.shape[0]} x {d.shape[1]}" + (f" x {d.groups}" if d.groups > 1 else "")
            rank = "dense" if d.rank is None else str(d.rank)
            rows.append(
                (d.name, shape, rank, f"{d.dense_weights:,}", f"{d.kept_weights:,}", d.reason)
            )
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, f"whole model: {self.compression:.1%} of the parameters removed"])


def packed_size(shape: tuple[int, int], rank: int, groups: int = 1) -> int:
    """Entries (m + r + n) r of a packed weight, times the groups."""
    return groups * (shape[0] + rank + shape[1]) * rank


def matrix_of(module: nn.Module) -> tuple[tuple[int, int], int]:
    """Shape (m, n) of the matricised weight of each group, and the number of groups."""
    weight: Any = module.weight
    groups = getattr(module, "groups", 1)
    return (weight.shape[0] // groups, math.prod(weight.shape[1:])), groups


def unsupported(model: nn.Module) -> list[str]:
    """Kinds of modules that hold weights and cannot become low-rank, with how many weights."""
    found: dict[str, list[int]] = {}
    for module in model.modules():
        if type(module) in LAYERS:
            continue
        kind = getattr(module, "original_name", None) or type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            kind += ", scripted"
        elif isinstance(module, LowRankLayer):
            kind += ", low-rank already: densify it first"
        size = sum(
            p.numel()
            for p in module.parameters(recurse=False)
            if not isinstance(p, _LAZY) and p.ndim >= 2
        )
        if not size and callable(getattr(module, "weight", None)):  # torch's quantized layers
            kind, size = f"{kind}, quantized", int(module.weight().numel())  # type: ignore[operator, union-attr]
        if size:
            found.setdefault(kind, []).append(size)
    return [f"{len(n)} x {kind} ({sum(n):,} weights)" for kind, n in found.items()]


def output_layer(model: nn.Module) -> str | None:
    """Name of the layer whose outputs are the model's own; None if no layer looks like it.

    It is the last linear layer of the module tree, if it has fewer than 64 outputs or more than 4
    times as many inputs as outputs. Exactly 4 times is usual in the feed-forward parts of
    transformers.
    """
    kinds = (nn.Linear, LowRankLinear)
    last = [(n, x) for n, x in model.named_modules(remove_duplicate=False) if isinstance(x, kinds)]
    if not last or last[-1][1] is model or not isinstance(last[-1][1], nn.Linear):
        return None
    module = last[-1][1]
    if module.out_features >= 64 and module.in_features <= 4 * module.out_features:
        return None
    return next(n for n, x in model.named_modules() if x is module)


def _names_it(rule: Any, name: str) -> bool:
    """Whether the rank's rule leaves the output layer to the user: an int, or its own name."""
    if isinstance(rule, Mapping):
        pattern = next((p for p in rule if fnmatchcase(name, p)), None)
        return pattern is None or pattern == name or _names_it(rule[pattern], name)
    return isinstance(rule, numbers.Integral)


def _matches(name: str, patterns: Sequence[str] | None) -> bool:
    return any(fnmatchcase(name, p) for p in patterns or ())


def _check_rank(name: str, rule: Any) -> None:
    """An int >= 1, a share in (0, 1], or a dict of name patterns to either."""
    if isinstance(rule, Mapping):
        for pattern, value in rule.items():
            check_text("a pattern in rank", pattern)
            _check_rank(f"rank[{pattern!r}]", value)
    elif isinstance(rule, numbers.Integral):
        check_integer(name, rule, low=1)
    else:
        hint = "a float is a share of min(m, n), an int is the rank itself"
        share = check_number(name, rule, hint=hint)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"{name} as a share of min(m, n) must be in (0, 1], got {rule}")


def _rank_from(rule: Any, name: str, limit: int) -> int | None:
    """Rank of one layer from an int, a share of min(m, n), or a dict of name patterns."""
    if isinstance(rule, Mapping):
        for pattern, value in rule.items():
            if fnmatchcase(name, pattern):
                return _rank_from(value, name, limit)
        return None
    if isinstance(rule, numbers.Integral):
        return min(int(rule), limit)
    return max(1, round(float(rule) * limit))


def _energy_rank(name: str, module: nn.Module, energy: float) -> int:
    """Smallest rank with that share of ‖W‖² (for groups: the largest of theirs)."""
    (m, n), groups = matrix_of(module)
    weight: Any = module.weight
    if weight.is_meta or not bool(torch.isfinite(weight).all()):
        state = "has no values (meta)" if weight.is_meta else "holds NaN or Inf"
        raise ValueError(f"layer {name!r} cannot be ranked by energy: its weight {state}")
    s2 = linalg.svdvals(weight.detach().reshape(groups, m, n).double()).square()
    share = s2.cumsum(-1) / s2.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # The last partial sum may be 1 - roundoff.
    return min(min(m, n), int((share < energy - 1e-12).sum(-1).max()) + 1)


def _candidates(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[tuple[str, nn.Module, str]]:
    """(name, module, reason to stay dense or "") of every dense layer, shared ones once."""
    obstacles = Obstacles(model)
    out = []
    for name, module in model.named_modules():
        base = next((t for t in LAYERS if isinstance(module, t)), None)
        if base is None or isinstance(module, LowRankLayer):
            continue
        if include is not None and not _matches(name, include):
            reason = "not included"
        elif _matches(name, exclude):
            reason = "excluded"
        else:
            reason = obstacles.of_dense(module, base)
        out.append((name, module, reason))
    return out


def _check_patterns(model: nn.Module, **patterns: Sequence[str] | None) -> None:
    """Raise for a pattern without effect: what it was to keep dense would become low-rank."""
    layers = (*LAYERS, LowRankLayer)
    names = [n for n, module in model.named_modules() if isinstance(module, layers)]
    for key, given in patterns.items():
        for pattern in given or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{key} pattern {pattern!r} matches no layer; there are {names}")


def make_plan(
    model: nn.Module,
    *,
    rank: Any = None,
    compression: float | None = None,
    energy: float | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    keep_larger: bool = False,
    rank_multiple: int = 1,
) -> Plan:
    """Decide the rank of every dense layer; arguments as in :func:`lrmanifold.factorize`."""
    check_module("model", model)
    given = [
        k
        for k, v in (("rank", rank), ("compression", compression), ("energy", energy))
        if v is not None
    ]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of rank, compression and energy must be given, got {given or 'none'}"
        )
    if rank is not None:
        _check_rank("rank", rank)
    if compression is not None:
        compression = check_number(
            "compression", compression, low=0, high=1, open_low=True, open_high=True
        )
    if energy is not None:
        energy = check_number("energy", energy, low=0, high=1, open_low=True)
    multiple = check_integer("rank_multiple", rank_multiple, low=1)
    check_flag("keep_larger", keep_larger)
    include, exclude = check_patterns("include", include), check_patterns("exclude", exclude)
    _check_patterns(model, include=include, exclude=exclude)
    candidates = _candidates(model, include, exclude)
    output = output_layer(model)
    if output is not None and not _matches(output, include) and not _names_it(rank, output):
        reason = "output layer: include names it to factorize it"
        candidates = [(n, x, why or (reason if n == output else "")) for n, x, why in candidates]
    if isinstance(rank, Mapping):
        for pattern in rank:
            if not any(fnmatchcase(name, pattern) for name, _, _ in candidates):
                raise ValueError(
                    f"rank pattern {pattern!r} matches no layer; there are "
                    f"{[name for name, _, _ in candidates]}"
                )
    total = sum(p.numel() for p in model.parameters() if not isinstance(p, _LAZY))
    dense = sum(
        math.prod(matrix_of(mod)[0]) * matrix_of(mod)[1] if _sized(mod) else 0
        for _, mod, _ in candidates
    )

    def plan_with(choose: Callable[[str, nn.Module, int], int | None]) -> Plan:
        decisions = tuple(
            _decide(name, module, reason, choose, keep_larger, multiple)
            for name, module, reason in candidates
            if _sized(module)
        )
        return Plan(decisions, total - dense)

    if compression is not None:
        return _plan_for_compression(compression, plan_with)
    if energy is not None:
        return plan_with(lambda name, module, limit: _energy_rank(name, module, energy))
    return plan_with(lambda name, module, limit: _rank_from(rank, name, limit))


def _sized(module: nn.Module) -> bool:
    """Whether the layer holds a weight of known shape."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not isinstance(weight, _LAZY) and weight.ndim >= 2


def _decide(name, module, reason, choose, keep_larger, multiple) -> Decision:
    shape, groups = matrix_of(module)
    if reason:
        return Decision(name, shape, groups, None, reason)
    rank = choose(name, module, min(shape))
    if rank is None:
        return Decision(name, shape, groups, None, "no rank given for it")
    rank = _rounded(rank, multiple, min(shape))
    if packed_size(shape, rank, 1) >= shape[0] * shape[1] and not keep_larger:
        return Decision(name, shape, groups, None, f"would not get smaller at rank {rank}")
    return Decision(name, shape, groups, rank, "")


def _rounded(rank: int, multiple: int, limit: int) -> int:
    """The nearest positive multiple within `limit`; `rank` itself where none fits."""
    nearest = max(1, round(rank / multiple)) * multiple
    nearest = min(nearest, limit // multiple * multiple)
    return nearest if nearest > 0 else rank


def _plan_for_compression(target: float, plan_with: Callable[..., Plan]) -> Plan:
    """The largest common share of min(m, n) that removes at least `target` of the parameters."""

    def at(share: float) -> Plan:
        # Shares have 40 binary digits at most, so the product is exact.
        return plan_with(lambda name, module, limit: max(1, int(share * limit)))

    smallest = at(0.0)
    if smallest.compression < target:
        raise ValueError(
            f"compression={target} cannot be reached: with every chosen layer at rank 1, "
            f"{smallest.compression:.1%} of the parameters are removed"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if at(middle).compression >= target else (low, middle)
    return at(low)
