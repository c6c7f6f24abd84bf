"""One engine for every rule: bundle, gather, guard, move, commit.

A weight, a bundle of equal small ones on the CPU, a padded batch of a whole network on an
accelerator and a vector of all biases take the same way; what differs is the coordinates `M` that
the rule is given. On the CPU a step is made whole or not at all: it raises before anything is
written. An accelerator is not waited for: a mask leaves out what cannot be moved, state included.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors
from ..linalg import all_finite
from ..manifolds import FixedRank
from ..precision import compute_dtype
from .accelerator import Flat, Padded, is_accelerated, may_be_padded, partition, real_view
from .coordinates import Ambient, is_factored
from .items import Item, Rule
from .velocities import Velocities

# Flops of a step below which its calls take longer than its work: on the CPU such weights of equal
# shape are copied into one tensor and back, which large ones pay for (benchmarks/speed, `step`).
_SMALL = 1_000_000
# Entries from which an ordinary parameter moves alone, without being copied: on the CPU biases and
# norms go together, on an accelerator all but the largest.
_COPIED, _COPIED_THERE = 10_000, 1_000_000


def _singular(item: Item) -> bool:
    """Whether the core of a low-rank weight has no inverse before any step."""
    if not isinstance(item.manifold, FixedRank):
        return False
    S = item.manifold.unpack(item.point.detach()).S
    return bool(torch.linalg.inv_ex(S.to(compute_dtype(S.dtype)))[1].any())


class Engine:
    """Moves parameters by a rule."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._plans: dict[Hashable, Any] = {}

    def move(self, items: Sequence[Item]) -> None:
        """Move all of these, or on the CPU none.

        Raises
        ------
        FloatingPointError
            On the CPU, if a gradient is not finite and its group does not skip, or if a step
            overflows or loses rank. Nothing is written then.
        """
        for commit in self.compute(items):
            commit()

    def compute(self, items: Sequence[Item]) -> list[Callable[[], Any]]:
        """The moves of these items, to be written by calling them; on accelerators made already."""
        commits: list[Callable[[], Any]] = []
        there: list[Item] = []
        for item in items:
            if not item.point.numel():
                commits.append(partial(self._move_nothing, item))
                continue
            if is_accelerated(item.point) or all_finite(real_view(item.grad)):
                there.append(item)
            elif item.group.get("skip_nonfinite", True):
                commits.append(partial(item.state["skipped"].add_, 1))
            else:
                raise FloatingPointError(f"the gradient of {item.label} holds NaN or Inf")
        for M, bundle in self._bundles(there):
            if is_accelerated(bundle[0].point):
                Y, new, ok = self._apply(M, bundle, masked=True)
                self._write(M, bundle, Y, new, ok)
            else:
                commits += self._moves(M, bundle)
        return commits

    def _move_nothing(self, item: Item) -> None:
        """Of a parameter without entries (rows that another process has) only the state is kept."""
        names = self.rule.names(item.group, item.manifold)
        self.forget(item, names)
        for name in names:
            item.state[name] = item.remembered(name, self.rule)
        item.state["step"] += 1

    def forget(self, item: Item, kept: Iterable[str]) -> None:
        """Drop vectors that a step has not kept: not transported, they are none at the point."""
        for gone in set(self.rule.vectors) - set(kept):
            item.state.pop(gone, None)

    # -- bundles

    def _bundles(self, items: Iterable[Item]) -> Iterable[tuple[Any, list[Item]]]:
        """What moves together, and in which coordinates."""
        bundles: dict[Hashable, list[Item]] = {}
        for item in items:
            bundles.setdefault(self._key(item), []).append(item)
        for bundle in bundles.values():
            first = bundle[0]
            M, margin = first.manifold, first.group.get("clip_margin", 0.0)
            if M is None:
                yield self._flat(bundle), bundle
            elif not is_factored(M):
                yield Ambient(M, margin), bundle
            elif is_accelerated(first.point) and may_be_padded(M):
                for part in partition([item.manifold for item in bundle]):  # type: ignore[misc]
                    chosen = [bundle[i] for i in part]
                    yield self._padding(chosen, margin), chosen
            else:
                yield Velocities(M, margin), bundle

    @staticmethod
    def _key(item: Item) -> Hashable:
        """What parameters must share to move as one batch."""
        p, M, accelerated = item.point, item.manifold, is_accelerated(item.point)
        alike = id(item.group), p.dtype, p.device
        if M is None:
            return alike if p.numel() < (_COPIED_THERE if accelerated else _COPIED) else id(item)
        if not is_factored(M):
            return id(item)
        assert isinstance(M, FixedRank)
        if accelerated and may_be_padded(M):
            return M.bundle_key, *alike
        # Half precision is computed in float32 copies anyway, grouped kernels are batches.
        alone = p.ndim > 2 or p.dtype != compute_dtype(p.dtype)
        small = accelerated or 8 * p.shape[0] * p.shape[1] ** 2 <= _SMALL
        return id(item) if alone or not small else (M.bundle_key, M.m, M.n, M.rank, *alike)

    def _flat(self, items: Sequence[Item]) -> Flat:
        points = [item.point for item in items]
        key = (*(p.numel() for p in points), points[0].dtype, points[0].device)
        return self._kept(key, lambda: Flat(points))

    def _padding(self, items: Sequence[Item], margin: float) -> Padded:
        sets: list[Any] = [item.manifold for item in items]
        points = [item.point for item in items]
        sizes = ((M.m, M.n, M.rank, *p.shape[:-2]) for M, p in zip(sets, points, strict=True))
        key = *sizes, sets[0].bundle_key, points[0].dtype, points[0].device, margin
        return self._kept(key, lambda: Padded(sets, points, margin))

    def _kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Index tensors are sent to the device once."""
        if key not in self._plans:
            if len(self._plans) > 64:
                self._plans.clear()  # of ranks that have changed
            self._plans[key] = make()
        return self._plans[key]

    # -- the step

    def _apply(self, M: Any, items: Sequence[Item], *, masked: bool = False) -> tuple:
        """The rule on all of these: the new point, the new state, and which weights may move."""
        rule, group, count = self.rule, items[0].group, len(items)
        wide = compute_dtype(real_view(items[0].point).dtype)
        X = M.gather([item.point for item in items], point=True).to(wide)
        G = M.gather([item.grad for item in items]).to(wide)
        G = -G if group.get("maximize") else G
        ok = None
        if masked and group.get("skip_nonfinite", True):
            ok = M.finite(G, count)
            G = torch.where(M.mask(ok, G), G, 0.0)
        old = {}
        for name in rule.names(group, items[0].manifold):
            values = [item.remembered(name, rule) for item in items]
            moment = name in rule.moments
            gather = M.gather_moments if moment else M.gather
            old[name] = gather(values).to(wide)
        state = {k: v if k in rule.moments else M.split(v) for k, v in old.items()}
        state["step"] = self._count(M, items)
        move = rule.move_dense if isinstance(M, Flat) else rule.move
        Y, new = move(M, M.split(X), M.split(G), state, group)
        if ok is not None:
            Y = M.join(Y)
            new = {k: v if k in rule.moments else M.join(v) for k, v in new.items()}
            # as it will be stored: float16 ends at 65504
            stored = real_view(items[0].point).dtype
            for value in (Y, *(new[k] for k in rule.vectors if k in new)):
                ok = ok & M.finite(value.to(stored), count)
            for value in (new[k] for k in rule.moments if k in new):
                ok = ok & M.finite(value[..., None], count)
            Y = torch.where(M.mask(ok, Y), Y, X)
            new = {k: torch.where(M.mask(ok, v), v, old[k]) for k, v in new.items()}
        return Y, new, ok

    def _count(self, M: Any, items: Sequence[Item]) -> Any:
        """The number of this step, from 1; a tensor where weights differ or live elsewhere."""
        steps = [item.state["step"] for item in items]
        if not is_accelerated(items[0].point) and len({int(step) for step in steps}) == 1:
            return float(steps[0]) + 1.0
        if not self.rule.moments:
            return None  # nobody asks
        dtype = compute_dtype(real_view(items[0].point).dtype)
        return M.each_moment(torch.stack(steps).to(dtype) + 1.0)

    def _moves(self, M: Any, items: Sequence[Item]) -> list[Callable[[], Any]]:
        """On the CPU: compute, look whether it is finite, and leave the writing for later."""
        try:
            Y, new = self._finite_step(M, items)
        except (ValueError, RuntimeError) as error:
            # LinAlgError is a RuntimeError, as is a rate beyond the range of the dtype.
            known = isinstance(error, (ValueError, torch.linalg.LinAlgError))
            if not known and "overflow" not in str(error):
                raise
            if len(items) > 1:  # one of them is at fault: alone, it is named
                flat = isinstance(M, Flat)
                alone = (
                    Flat([x.point]) if flat else Velocities(x.manifold, M.margin) for x in items
                )
                return [c for M, x in zip(alone, items, strict=True) for c in self._moves(M, [x])]
            why, way_out = self._explained(M, items[0], error)
            raise FloatingPointError(
                f"the step of {items[0].label} cannot be made: {why} "
                f"(lr = {items[0].group['lr']}; nothing has moved). {way_out}"
            ) from error
        return [partial(self._write, M, items, Y, new)]

    def _explained(self, M: Any, item: Item, error: Exception) -> tuple[str, str]:
        """Why a step cannot be made, and a way out; kernels speak of arguments that say nothing."""
        added = "is optimizer.zero_grad() missing, so that gradients add up?"
        lost = isinstance(error, torch.linalg.LinAlgError)
        if lost and _singular(item):
            return "its core S is singular, and its retraction divides by S", (
                "Give its manifold a retraction that does not, such as 'svd', 'ksl' or 'bug'."
            )
        if lost or "full column rank" in str(error):
            why = "it is so long that the weight loses rank"
            return why, f"Lower lr or penalty, or {added}"
        try:
            self._finite_step(M, [replace(item, group={**item.group, "lr": 0.0})])
        except (ValueError, RuntimeError):
            return "it overflows at every lr", (
                "Clip gradients first (torch.nn.utils.clip_grad_norm_), scale the loss down, or "
                f"lower penalty; or {added}"
            )
        return str(error), f"Lower lr or penalty, or {added}"

    def _finite_step(self, M: Any, items: Sequence[Item]) -> tuple[Any, dict[str, Any]]:
        """The rule on all of these; ValueError if anything of it is not finite."""
        Y, new, _ = self._apply(M, items)
        # as it will be stored: float16 ends at 65504
        dtype = real_view(items[0].point).dtype
        vectors = (Y, *(x for k, x in new.items() if k not in self.rule.moments))
        blocks = [t.to(dtype) for x in vectors for t in ((x,) if isinstance(x, Tensor) else x)]
        if not all(map(all_finite, (*blocks, *(new[k] for k in self.rule.moments if k in new)))):
            raise ValueError("it overflows")
        return Y, new

    def _write(
        self, M: Any, items: Sequence[Item], Y: Any, new: dict[str, Any], ok: Tensor | None = None
    ) -> None:
        """Put a computed step into parameters and state; `ok` tells which weights have moved."""
        for item in items:
            self.forget(item, new)
        alone = len(items) == 1 and not is_accelerated(items[0].point)
        for name, value in ((None, Y), *new.items()):
            if alone and isinstance(value, Factors) and name is not None:
                items[0].state[name] = M.join(value).to(items[0].point.dtype)
                continue
            if alone and isinstance(value, Factors):
                for old, block in zip(M.split(items[0].point), value, strict=True):
                    old.copy_(block)
                continue
            scatter = M.scatter_moments if name in self.rule.moments else M.scatter
            parts = scatter(value if isinstance(value, Tensor) else M.join(value), len(items))
            # In place, so that a captured graph goes on from where it was.
            places = [self._place(item, name) for item in items]
            parts = [part.reshape(x.shape) for part, x in zip(parts, places, strict=True)]
            torch._foreach_copy_(places, parts)
        steps = [item.state["step"] for item in items]
        if ok is None:
            torch._foreach_add_(steps, 1)
        else:
            torch._foreach_add_(steps, list(ok.to(torch.int64).unbind()))
            skipped = [item.state["skipped"] for item in items]
            torch._foreach_add_(skipped, list((~ok).to(torch.int64).unbind()))

    def _place(self, item: Item, name: str | None) -> Tensor:
        """Where to write: the point, or an entry of the state, made when it is first needed.

        An entry follows a parameter that became one of another dtype, as it does through a file.
        """
        if name is None:
            return real_view(item.point)
        dtype = item.point.dtype
        dtype = compute_dtype(dtype) if name in self.rule.moments else dtype
        item.state[name] = item.remembered(name, self.rule).to(dtype)
        return real_view(item.state[name])
