"""What an optimizer remembers of each parameter's geometry, and what it refuses."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from ..errors import GeometryError
from ..manifolds import FixedRank
from ..parameter import is_sharded, manifold_of
from ..precision import compute_dtype, storage_tolerance

# Rounding that a projection repairs without changing what the network computes by more than this.
_REPAIRABLE = 0.05
# On the CPU the geometry is measured this often, for manifolds whose retraction lets points drift.
_CHECK_EVERY = 100

Entry = tuple[dict[str, Any], Tensor, geoopt.Manifold | None, "Label"]


class GeometryMemory:
    """The manifold that each parameter had when it was added, and who wrote to it last."""

    def __init__(self) -> None:
        self.manifolds: list[list[geoopt.Manifold | None]] = []
        self.marks: dict[Tensor, tuple] = {}

    def add_group(self, params: Sequence[Tensor]) -> None:
        """Remember the manifolds of a new group."""
        self.manifolds.append([manifold_of(p) for p in params])

    def entries(self, groups: Sequence[dict[str, Any]]) -> Iterator[Entry]:
        """Every parameter with its group, its manifold and a label for messages.

        Raises
        ------
        GeometryError
            If a manifold was lost, or the groups were edited by hand.
        """
        sizes = [len(group["params"]) for group in groups]
        if sizes != [len(known) for known in self.manifolds]:
            raise GeometryError(
                f"the parameter groups were edited by hand and now hold {sizes} parameters: use "
                "add_param_group, which remembers manifolds, or build a new optimizer"
            )
        for g, (group, manifolds) in enumerate(zip(groups, self.manifolds, strict=True)):
            for i, p in enumerate(group["params"]):
                label, known, now = Label(group, g, i), manifolds[i], manifold_of(p)
                if known is None and now is not None:
                    manifolds[i] = now
                elif known is not None and not _same_kind(known, now):
                    raise GeometryError(
                        f"{label} was on {known.name} and now is "
                        f"{'an ordinary tensor' if now is None else 'on ' + str(now.name)}, shape "
                        f"{tuple(p.shape)}: its manifold was lost; wrap it again in "
                        "geoopt.ManifoldParameter(p, manifold=...) or build a new optimizer"
                    )
                yield group, p, now, label

    def ensure_on_manifold(
        self, key: Tensor, X: Tensor, manifold: geoopt.Manifold, step: Any, label: Label
    ) -> None:
        """Measure the point `X` when somebody else wrote to it; repair rounding, refuse the rest.

        `key` is the parameter that `X` belongs to, itself unless that is sharded.
        """
        if X.is_meta:
            return
        untouched = self.marks.get(key) == mark(X)
        periodic = X.device.type == "cpu" and int(step) % _CHECK_EVERY == 0
        if untouched and not periodic:
            return
        tolerance = storage_tolerance(X.dtype)
        ok, _ = manifold.check_point_on_manifold(X, explain=True, atol=tolerance, rtol=tolerance)
        if ok:
            return
        if not bool(torch.isfinite(X).all()):
            raise GeometryError(
                f"{label} is not on its manifold {manifold.name}: it holds NaN or Inf, which no "
                "projection mends: load the model from a checkpoint, or build it anew"
            )
        repair = max(_REPAIRABLE, tolerance)
        ok, reason = manifold.check_point_on_manifold(X, explain=True, atol=repair, rtol=repair)
        if not ok:
            raise GeometryError(
                f"{label} is not on its manifold {manifold.name}: {reason}. If it was written to "
                "on purpose, bring it back first: p.data.copy_(p.manifold.projx(p))"
            )
        X.copy_(manifold.projx(X))

    def settle(self, key: Tensor, X: Tensor) -> None:
        """Note that the present value is the optimizer's own."""
        self.marks[key] = mark(X)


class Label:
    """A parameter's name in messages, put together only when there is one.

    The name that it was given to the optimizer with; else its place and its shape.
    """

    __slots__ = ("_group", "_number", "_place")

    def __init__(self, group: dict[str, Any], number: int, place: int) -> None:
        self._group, self._number, self._place = group, number, place

    def __str__(self) -> str:
        names = self._group.get("param_names")
        if names:
            return repr(names[self._place])
        p = self._group["params"][self._place]
        M = manifold_of(p)
        size = f"shape {tuple(p.shape)}"
        if isinstance(M, FixedRank):
            size = f"{M.m} x {M.n}, rank {M.rank}"
        return f"parameter {self._place} of group {self._number} ({size})"


def check_vector(key: str, vector: Tensor, p: Tensor, label: Any) -> None:
    """Refuse a vector of the state that belongs to another rank than the parameter has now."""
    if vector.shape != p.shape:
        raise ValueError(
            f"{key} of {label} has shape {tuple(vector.shape)}, the parameter {tuple(p.shape)}: it "
            "became one of another rank, as a state dict makes it. Load the optimizer's state too, "
            "or build a new optimizer"
        )


def check_apart(parameters: Iterable[tuple[Tensor, Any]]) -> None:
    """Refuse two parameters in one memory: of their steps the second would undo the first."""
    known: dict[int, Any] = {}
    for p, label in parameters:
        if is_sharded(p) or p.is_meta or not p.numel():
            continue
        address = p.data_ptr()
        other = known.setdefault(address, label)
        if address and other is not label:
            raise ValueError(
                f"{other} and {label} must not share their memory, as one parameter given twice "
                "does, and tied weights after load_state_dict(assign=True): tie the modules again "
                "(b.weight = a.weight), then build the optimizer anew"
            )


def mark(p: Tensor) -> tuple:
    """What changes when somebody writes to `p`; an accelerator is not waited for.

    torch counts ``p.copy_``, but neither ``p.data = x`` (another storage) nor ``p.data.copy_``: on
    the CPU a number tells that one, in which every entry has a weight of its own.
    """
    storage: Any = p.untyped_storage()
    total = 0.0
    if p.device.type == "cpu" and p.numel():
        rows = p.detach().reshape(-1, p.shape[-1] if p.ndim else 1).to(compute_dtype(p.dtype))
        left, right = (_weights(n, rows.dtype) for n in rows.shape)
        total = float(left @ (rows @ right))
    return p._version, storage._cdata, p.storage_offset(), tuple(p.shape), p.stride(), total


@functools.lru_cache(maxsize=256)
def _weights(n: int, dtype: torch.dtype) -> Tensor:
    """n different numbers between 1 and 2: multiples of the golden ratio, without what is whole."""
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    k = torch.arange(1, n + 1, dtype=torch.float64, device="cpu")
    return (1.0 + (ratio * k).remainder(1.0)).to(dtype)


def content_mark(X: Tensor) -> tuple:
    """As :func:`mark`, of the values alone: the same on every process that has the same tensor."""
    return (float(X.detach().sum(dtype=torch.float64)),)


def _same_kind(known: geoopt.Manifold, now: geoopt.Manifold | None) -> bool:
    shapes = [getattr(M, "point_shape", None) for M in (known, now)]
    return now is known or (type(now) is type(known) and shapes[0] == shapes[1])
