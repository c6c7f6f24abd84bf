"""Which layers become low-rank, at which rank, and why the others stay dense."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from ._obstacles import ATTENTION_WEIGHTS
from .candidates import Candidate, candidates, layer_names, output_layer
from .inventory import Other, merged, others_of
from .kinds import matrices_of, matrix_of, weight_parameters

Choice = Callable[[Candidate, int], int | None]

_LAZY = nn.parameter.UninitializedParameter


@dataclass(frozen=True)
class Decision:
    """What becomes of one dense layer: its new `rank`, or None and the `reason` it stays dense.

    `name` is the layer's, or that of a projection of an attention ("layers.0.self_attn.q_proj").
    A layer whose weight is that of an earlier one, `tied_to`, counts no weights of its own. `note`
    says that its share of min(m, n) was less than 1, so that the rank is 1.
    """

    name: str
    shape: tuple[int, int]
    groups: int
    rank: int | None
    reason: str
    tied_to: str = ""
    made_of: int = 0
    note: str = ""

    @property
    def dense_weights(self) -> int:
        """Entries of the dense weight; of one that is computed, of what it is made of."""
        size = self.made_of or self.groups * self.shape[0] * self.shape[1]
        return 0 if self.tied_to else size

    @property
    def kept_weights(self) -> int:
        """Entries of the weight after the decision."""
        if self.rank is None or self.tied_to:
            return self.dense_weights
        return packed_size(self.shape, self.rank, self.groups)


@dataclass(frozen=True)
class Plan:
    """What becomes of every parameter of a model; prints as a table.

    Attributes
    ----------
    decisions : tuple of Decision
        For all dense layers, in the order of the model's modules.
    others : tuple of Other
        All other parameters, module by module, with the reason why they stay: biases, norms,
        recurrent layers, parameters of modules of one's own. Together with the decisions they add
        up to all parameters of the model.
    """

    decisions: tuple[Decision, ...]
    others: tuple[Other, ...]

    @property
    def other_weights(self) -> int:
        """Parameters that are no matrix of a layer above."""
        return sum(other.weights for other in self.others)

    @property
    def dense_weights(self) -> int:
        """All parameters before."""
        return self.other_weights + sum(d.dense_weights for d in self.decisions)

    @property
    def kept_weights(self) -> int:
        """All parameters after."""
        return self.other_weights + sum(d.kept_weights for d in self.decisions)

    @property
    def compression(self) -> float:
        """Share of the whole model's parameters that is removed."""
        before = self.dense_weights
        return 1.0 - self.kept_weights / before if before else 0.0

    def __str__(self) -> str:
        before = max(1, self.dense_weights)
        rows = [("layer", "shape", "rank", "weights", "share", "kept", "note")]
        for d in self.decisions:
            shape = f"{d.shape[0]} x {d.shape[1]}" + (f" x {d.groups}" if d.groups > 1 else "")
            rank = "dense" if d.rank is None else str(d.rank)
            share, note = f"{d.dense_weights / before:.1%}", d.reason or d.note
            if d.tied_to and d.rank is not None:
                note = f"shares the weight of {d.tied_to}"
            counts = f"{d.dense_weights:,}", share, f"{d.kept_weights:,}"
            rows.append((d.name or "(model)", shape, rank, *counts, note))
        for o in merged(self.others):
            counts = f"{o.weights:,}", f"{o.weights / before:.1%}", f"{o.weights:,}"
            rank = "dense" if o.rank is None else str(o.rank)
            rows.append((o.name or "(model)", o.kind, rank, *counts, o.reason))
        totals = f"{self.dense_weights:,}", "100.0%", f"{self.kept_weights:,}"
        rows.append(("total", "", "", *totals, ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                c.rjust(w) if i in (3, 4, 5) else c.ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, f"whole model: {self.compression:.1%} of the parameters removed"])


def packed_size(shape: tuple[int, int], rank: int, groups: int = 1) -> int:
    """Entries (m + r + n) r of a packed weight, times the groups."""
    return groups * (shape[0] + rank + shape[1]) * rank


def _names_it(rule: Any, name: str) -> bool:
    """Whether the rank's rule leaves the output layer to the user: an int, or its own name."""
    if isinstance(rule, Mapping):
        pattern = next((p for p in rule if fnmatchcase(name, p)), None)
        return pattern is None or pattern == name or _names_it(rule[pattern], name)
    return isinstance(rule, numbers.Integral)


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
            whole = f": {share:.0f} is the rank itself" if share == round(share) > 0 else ""
            raise ValueError(f"{name} as a share of min(m, n) must be in (0, 1], got {rule}{whole}")


def _rule_for(rule: Any, c: Candidate) -> Any:
    """The int or the share that a dict of name patterns has for one layer; None without one."""
    while isinstance(rule, Mapping):
        rule = next((value for pattern, value in rule.items() if c.matches([pattern])), None)
    return rule


def _rank_from(rule: Any, c: Candidate, limit: int) -> int | None:
    """Rank of one layer from an int, a share of min(m, n), or a dict of name patterns."""
    rule = _rule_for(rule, c)
    if rule is None:
        return None
    if isinstance(rule, numbers.Integral):
        return min(int(rule), limit)
    return max(1, round(float(rule) * limit))


def _with_note(d: Decision, rule: Any, c: Candidate) -> Decision:
    """Say where a share is so small that no rank was left of it."""
    share, limit = _rule_for(rule, c), min(d.shape)
    if d.rank is None or isinstance(share, numbers.Integral) or round(float(share) * limit) >= 1:
        return d
    return replace(d, note=f"{share:g} of {limit} is less than 1")


def _energy_rank(name: str, module: nn.Module, energy: float) -> int:
    """Smallest rank with that share of ‖W‖² (for groups: the largest of theirs)."""
    (m, n), _ = matrix_of(module)
    weight: Any = module.weight
    if weight.is_meta or not bool(torch.isfinite(weight).all()):
        state = "has no values (meta)" if weight.is_meta else "holds NaN or Inf"
        raise ValueError(f"layer {name!r} cannot be ranked by energy: its weight {state}")
    s2 = linalg.svdvals(matrices_of(module).detach().double()).square()
    share = s2.cumsum(-1) / s2.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # The last partial sum may be 1 - roundoff.
    return min(min(m, n), int((share < energy - 1e-12).sum(-1).max()) + 1)


def _check_patterns(model: nn.Module, **patterns: Sequence[str] | None) -> None:
    """Raise for a pattern without effect: what it was to keep dense would become low-rank."""
    names = layer_names(model)
    for key, given in patterns.items():
        for pattern in given or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{key} pattern {pattern!r} matches no layer; there are {names}")


def _with_rules(
    found: list[Candidate], model: nn.Module, include: Sequence[str] | None, rank: Any
) -> list[Candidate]:
    """Output layers and tables of embeddings stay dense where nobody asked for them."""
    output = output_layer(model)
    asked = {c.key for c in found if c.matches(_named(include, rank))}
    out: list[Candidate] = []
    for c in found:
        if isinstance(c.module, nn.Embedding) and c.key not in asked:
            continue  # among the others of the plan, which say why
        reason = c.reason
        named = c.key in asked or c.matches(include) or _names_it(rank, c.name)
        if c.name == output and not (reason or named):
            reason = "output layer: include names it to factorize it"
        known = c.tied_to in {d.name for d in out}
        out.append(replace(c, reason=reason, tied_to=c.tied_to if known else ""))
    return out


def _named(include: Sequence[str] | None, rank: Any) -> list[str]:
    """The patterns that mean certain layers, not just all of them."""
    patterns = [*(include or ()), *(rank if isinstance(rank, Mapping) else ())]
    return [p for p in patterns if p != "*"]


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
    found = candidates(model, include, exclude, _named(include, rank))
    found = _with_rules(found, model, include, rank)
    if isinstance(rank, Mapping):
        for pattern in rank:
            if not any(c.matches([pattern]) for c in found):
                raise ValueError(
                    f"rank pattern {pattern!r} matches no layer; there are "
                    f"{[c.name for c in found]}"
                )
    found = [c for c in found if _sized(c.module)]
    others = others_of(model, {i for c in found for i in _ids(c)})

    def plan_with(choose: Choice) -> Plan:
        return Plan(_decisions(found, choose, keep_larger, multiple), others)

    if compression is not None:
        return _plan_for_compression(compression, plan_with)
    if energy is not None:
        return plan_with(lambda c, limit: _energy_rank(c.name, c.module, energy))
    plan = plan_with(lambda c, limit: _rank_from(rank, c, limit))
    noted = (_with_note(d, rank, c) for d, c in zip(plan.decisions, found, strict=True))
    return replace(plan, decisions=tuple(noted))


def _ids(c: Candidate) -> list[int]:
    """Of the parameters that a decision counts."""
    if c.attention is None:
        own: list[Any] = list(weight_parameters(c.module))
    else:
        own = [c.attention._parameters.get(key) for key in ATTENTION_WEIGHTS]
        own.append(c.attention.out_proj.weight)
    return [id(p) for p in own if p is not None]


def _decisions(
    found: list[Candidate], choose: Choice, keep_larger: bool, multiple: int
) -> tuple[Decision, ...]:
    out: dict[str, Decision] = {}
    for c in found:
        first = out.get(c.tied_to)
        if first is not None and not c.reason:  # the same weight, so the same rank
            out[c.name] = replace(first, name=c.name, tied_to=c.tied_to)
        else:
            out[c.name] = _decide(c, choose, keep_larger, multiple)
    return tuple(out.values())


def _sized(module: nn.Module) -> bool:
    """Whether the layer holds a weight of known shape."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not isinstance(weight, _LAZY) and weight.ndim >= 2


def _decide(c: Candidate, choose: Choice, keep_larger: bool, multiple: int) -> Decision:
    shape, groups = matrix_of(c.module)
    made_of = 0 if c.attention is not None else sum(p.numel() for p in weight_parameters(c.module))

    def stays(reason: str) -> Decision:
        return Decision(c.name, shape, groups, None, reason, c.tied_to, made_of)

    if c.reason:
        return stays(c.reason)
    rank = choose(c, min(shape))
    if rank is None:
        return stays("no rank given for it")
    rank = _rounded(rank, multiple, min(shape))
    if packed_size(shape, rank, 1) >= shape[0] * shape[1] and not keep_larger:
        return stays(f"would not get smaller at rank {rank}")
    return Decision(c.name, shape, groups, rank, "", c.tied_to)


def _rounded(rank: int, multiple: int, limit: int) -> int:
    """The nearest positive multiple within `limit`; `rank` itself where none fits."""
    nearest = max(1, round(rank / multiple)) * multiple
    nearest = min(nearest, limit // multiple * multiple)
    return nearest if nearest > 0 else rank


def _plan_for_compression(target: float, plan_with: Callable[..., Plan]) -> Plan:
    """The largest common share of min(m, n) that removes at least `target` of the parameters."""

    def at(share: float) -> Plan:
        # Shares have 40 binary digits at most, so the product is exact.
        return plan_with(lambda c, limit: max(1, int(share * limit)))

    smallest = at(0.0)
    if smallest.compression < target:
        if not any(decision.rank for decision in smallest.decisions):
            why = "; ".join(dict.fromkeys(d.reason for d in smallest.decisions)) or "there is none"
            raise ValueError(f"compression={target} cannot be reached: no layer is chosen ({why})")
        raise ValueError(
            f"compression={target} cannot be reached: with every chosen layer at rank 1, "
            f"{smallest.compression:.1%} of the parameters are removed"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if at(middle).compression >= target else (low, middle)
    return at(low)
