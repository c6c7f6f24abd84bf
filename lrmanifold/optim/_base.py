"""What every optimizer here shares: memory of geometry, and steps that survive bad gradients."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from ..errors import GeometryError
from ..linalg import ClipMemory, all_finite, compute_dtype
from ..manifolds import FixedRank
from ..parameter import is_sharded, manifold_of
from ..precision import storage_tolerance
from ._distributed import WIDE_STATE, may_be_shared_out, move_sharded, move_shared_out
from ._factored import Workspace

Ok = bool | Tensor
# A parameter in a step: its group, itself, its manifold, a label for messages.
Item = tuple[dict[str, Any], Tensor, geoopt.Manifold | None, str]

# Rounding that a projection repairs without changing what the network computes by more than this.
_REPAIRABLE = 0.05
# On the CPU the geometry is measured this often, for manifolds whose retraction lets points drift.
_CHECK_EVERY = 100
# Options of torch's optimizers that do not exist here: in a group they would be ignored in silence.
_UNSUPPORTED = frozenset({"foreach", "fused", "capturable", "differentiable", "dampening"})


class GeometricOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: each parameter is moved on the manifold it had when it was added.

    Subclasses implement :meth:`_update`. This class validates options, looks after parameters that
    lost their manifold, guards against NaN and Inf in gradients, and counts what it skipped.
    """

    # Whether the ranks of a process group share out the low-rank weights.
    _distribute = False

    def _shared_state(self, item: Item) -> dict[str, tuple[int, ...] | None]:
        """Entries of the state that ranks send each other, and their shapes; None: not now."""
        raise NotImplementedError  # only where `_distribute` may be set

    # Options that must be finite and non-negative, checked for every group.
    _non_negative: tuple[str, ...] = ("lr", "weight_decay", "penalty")

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._geometry: list[list[geoopt.Manifold | None]] = []
        self._marks: dict[Tensor, tuple] = {}
        # These spare work and change no result: never saved.
        self._workspace = Workspace()
        self._cores: dict[Tensor, ClipMemory] = {}
        self._sums: dict[Tensor, float] = {}  # the same for sharded parameters
        super().__init__(params, defaults)

    # -- groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; remembers the manifold of each of its parameters."""
        super().add_param_group(param_group)
        try:
            self._check_options(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        self._geometry.append([manifold_of(p) for p in self.param_groups[-1]["params"]])

    def _check_options(self, group: dict[str, Any]) -> None:
        for key in sorted(_UNSUPPORTED):
            if group.get(key):
                name = type(self).__name__
                raise TypeError(f"{key} is not an option of {name}, got {group[key]!r}")
        for key in self._non_negative:
            value = group.get(key, 0.0)
            if isinstance(value, Tensor):
                continue
            if not (isinstance(value, (int, float)) and 0.0 <= value < math.inf):
                raise ValueError(f"{key} must be a finite number >= 0, got {value!r}")
        if group.get("weight_decay") or group.get("penalty"):
            for p in group["params"]:
                manifold = manifold_of(p)
                if manifold is not None and not isinstance(manifold, FixedRank):
                    raise ValueError(
                        f"weight_decay and penalty must be 0 for parameters on {manifold.name}: "
                        "they act on the core of a low-rank weight; put the parameter in a group "
                        "of its own"
                    )

    def __getstate__(self) -> dict[str, Any]:
        # With the memory of geometry: a copy must miss a manifold that was lost before it was made.
        return {**super().__getstate__(), "_geometry": self._geometry}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._marks, self._sums, self._cores = {}, {}, {}
        self._workspace = Workspace()
        # A state saved by torch.optim.SGD, or by an older version, lacks some options.
        for group in self.param_groups:
            for key in self.defaults.keys() - _UNSUPPORTED:
                group.setdefault(key, self.defaults[key])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; continues bit for bit where the saved optimizer stopped."""
        super().load_state_dict(state_dict)
        # torch keeps the very tensors where it can; steps write into them, and not for two.
        for state in self.state.values():
            state.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})
        # torch casts all state to the parameter's dtype: counters must stay integers, and what was
        # kept in float32 for the sake of float16 must stay so.
        saved = state_dict["state"]
        ids = [k for g in state_dict["param_groups"] for k in g["params"]]
        params = [p for g in self.param_groups for p in g["params"]]
        for key, p in zip(ids, params, strict=True):
            for name in ("skipped", "step", *WIDE_STATE):
                if name in saved.get(key, {}):
                    value = torch.as_tensor(saved[key][name])
                    self.state[p][name] = value.to(device=self.state[p][name].device, copy=True)

    @property
    def skipped_steps(self) -> int:
        """Number of parameter updates left out for a NaN or Inf gradient (waits for the device)."""
        return sum(int(s["skipped"]) for s in self.state.values() if "skipped" in s)

    # -- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step from the gradients present; parameters without a gradient stay as they are.

        A point is measured at its first step and after somebody else wrote to it; on an accelerator
        only then does the host wait for the device. There, a write through ``p.data`` that keeps
        the storage goes unseen; on the CPU none does.

        Parameters
        ----------
        closure : callable, optional
            Re-evaluates the model and returns the loss; called once, with gradients enabled.

        Raises
        ------
        GeometryError
            If a parameter lost its manifold, or is off it by more than rounding.
        FloatingPointError
            On the CPU, if a step is so long that it overflows or loses rank to working precision.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with without_autocast(p.device.type for g in self.param_groups for p in g["params"]):
            self._move()
        return loss

    # Eager also within torch.compile: decisions by size and the memory of who wrote to a weight
    # are no graph. Compiled, 12 layers took 119 graphs with 129 breaks and minutes.
    @torch.compiler.disable
    def _move(self) -> None:
        """Move every parameter that has a gradient."""
        sharded: list[Item] = []
        items: list[Item] = []
        for item in self._parameters():
            _, p, _, label = item
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(f"sparse gradients are not supported, got one for {label}")
            (sharded if is_sharded(p) else items).append(item)
        move_sharded(self, sharded)
        if self._distribute:
            shared_out = [item for item in items if may_be_shared_out(item)]
            self._move_here([item for item in items if not may_be_shared_out(item)])
            move_shared_out(self, shared_out, self._move_here)
        else:
            self._move_here(items)

    def _move_here(self, items: Sequence[Item]) -> None:
        """Move these parameters, of equal ones many at once."""
        bundles: dict[Any, list[Item]] = {}
        for item in items:
            bundles.setdefault(self._bundle_key(*item[:3]), []).append(item)
        for bundle in bundles.values():
            if len(bundle) == 1 or not self._update_together(bundle):
                for item in bundle:
                    self._guarded_update(*item)

    def _bundle_key(
        self, group: dict[str, Any], p: Tensor, manifold: geoopt.Manifold | None
    ) -> Any:
        """Parameters of equal keys are offered to :meth:`_update_together`; by default none are."""
        return p

    def _update_together(self, bundle: list[Item]) -> bool:
        """Move all of these at once, or none and return False: each then moves by itself."""
        group, first, manifold, _ = bundle[0]
        assert isinstance(manifold, FixedRank)
        params = [item[1] for item in bundle]
        states = [self._state_of(p) for p in params]
        for (_, p, own, label), state in zip(bundle, states, strict=True):
            assert own is not None
            self._ensure_on_manifold(p, own, state, label)
        grads = torch.stack([p.grad for p in params if p.grad is not None])
        ok = None
        if first.device.type == "cpu":
            if not all_finite(grads):
                return False
        elif group["skip_nonfinite"]:
            ok = torch.isfinite(grads).flatten(1).all(1)
            grads = torch.where(ok[:, None, None], grads, torch.zeros_like(grads))
        grads = -grads if group["maximize"] else grads
        try:
            ok = self._step_together(manifold, params, grads, group, states, ok)
        except (ValueError, torch.linalg.LinAlgError):
            return False  # one of them is at fault: alone, it is named
        done: Any = ok.to(torch.int64).unbind() if ok is not None else [1] * len(states)
        for p, state, one in zip(params, states, done, strict=True):
            state["step"] += one
            state["skipped"] += 1 - one
            self._marks[p] = _mark(p)
        return True

    def _step_together(
        self,
        manifold: FixedRank,
        params: Sequence[Tensor],
        grads: Tensor,
        group: dict[str, Any],
        states: Sequence[dict[str, Any]],
        ok: Tensor | None,
    ) -> Tensor | None:
        """One step of all; see :func:`lrmanifold.optim._together.step_together`."""
        raise NotImplementedError  # only where `_bundle_key` gives equal keys

    def _parameters(
        self,
    ) -> Iterator[Item]:
        """Every parameter with its group, its checked manifold and a label for messages."""
        sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != [len(geometry) for geometry in self._geometry]:
            raise GeometryError(
                f"the parameter groups were edited by hand and now hold {sizes} parameters: use "
                "add_param_group, which remembers manifolds, or build a new optimizer"
            )
        for g, (group, geometry) in enumerate(zip(self.param_groups, self._geometry, strict=True)):
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                label = repr(names[i]) if names else f"parameter {i} of group {g}"
                known, now = geometry[i], manifold_of(p)
                if known is None and now is not None:
                    geometry[i] = known = now
                elif known is not None and not _same_kind(known, now):
                    raise GeometryError(
                        f"{label} was on {known.name} and now is "
                        f"{'an ordinary tensor' if now is None else 'on ' + str(now.name)}, shape "
                        f"{tuple(p.shape)}: its manifold was lost; wrap it again in "
                        "geoopt.ManifoldParameter(p, manifold=...) or build a new optimizer"
                    )
                yield group, p, now, label

    def _guarded_update(
        self, group: dict[str, Any], p: Tensor, manifold: geoopt.Manifold | None, label: str
    ) -> None:
        state, grad = self._state_of(p), p.grad
        assert grad is not None
        if manifold is not None:
            self._ensure_on_manifold(p, manifold, state, label)
        ok: Ok = True
        if p.device.type == "cpu":
            ok = all_finite(grad)
            if not ok and not group.get("skip_nonfinite", True):
                raise FloatingPointError(f"the gradient of {label} holds NaN or Inf")
            if not ok:
                state["skipped"] += 1
                return
        elif group.get("skip_nonfinite", True):
            # No host synchronisation: compute on zeros, then keep the old values where not finite.
            ok = torch.isfinite(grad).all()
            grad = torch.where(ok, grad, torch.zeros_like(grad))
        grad = -grad if group.get("maximize") else grad
        try:
            ok = self._update(p, grad, manifold, group, state, ok)
        except (ValueError, torch.linalg.LinAlgError) as error:
            # What the kernels say of a step too long to be made; nothing was written.
            raise FloatingPointError(
                f"the step of {label} cannot be made, lower lr or penalty: {error}"
            ) from error
        if isinstance(ok, Tensor):
            state["skipped"] += (~ok).to(torch.int64)
            state["step"] += ok.to(torch.int64)
        else:
            state["step"] += 1
        if manifold is not None:
            self._marks[p] = _mark(p)

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        if "skipped" not in state:
            state["skipped"] = torch.zeros((), dtype=torch.int64, device=p.device)
            state["step"] = torch.zeros((), dtype=torch.int64, device=p.device)
        return state

    @abstractmethod
    def _update(
        self,
        p: Tensor,
        grad: Tensor,
        manifold: geoopt.Manifold | None,
        group: dict[str, Any],
        state: dict[str, Any],
        ok: Ok,
    ) -> Ok:
        """Move `p` and its state where `ok`; `grad` is finite and must not be written to.

        Returns where they were moved: :func:`and_finite` of `ok` and the new point.
        """

    # -- geometry

    def _ensure_on_manifold(
        self, p: Tensor, manifold: geoopt.Manifold, state: dict[str, Any], label: str
    ) -> None:
        """Measure the point when somebody else wrote to it; repair rounding, refuse the rest."""
        untouched = self._marks.get(p) == _mark(p)
        periodic = p.device.type == "cpu" and int(state["step"]) % _CHECK_EVERY == 0
        if untouched and not periodic:
            return
        tolerance = storage_tolerance(p.dtype)
        ok, _ = manifold.check_point_on_manifold(p, explain=True, atol=tolerance, rtol=tolerance)
        if ok:
            return
        repair = max(_REPAIRABLE, tolerance)
        ok, reason = manifold.check_point_on_manifold(p, explain=True, atol=repair, rtol=repair)
        if not ok:
            raise GeometryError(
                f"{label} is not on its manifold {manifold.name}: {reason}. If it was written to "
                "on purpose, bring it back first: p.copy_(p.manifold.projx(p))"
            )
        p.copy_(manifold.projx(p))


@contextlib.contextmanager
def without_autocast(devices: Iterable[str]) -> Iterator[None]:
    """Within, products are made in the dtype of their factors on these kinds of device."""
    with contextlib.ExitStack() as stack:
        for kind in set(devices):
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def and_finite(ok: Ok, Y: Tensor) -> Ok:
    """`ok`, where it is a tensor, only if the new point `Y` is finite too.

    A finite gradient can overflow on its way. On the CPU that raises.
    """
    if isinstance(ok, Tensor):
        return ok & torch.isfinite(Y).all()
    if Y.device.type == "cpu" and not all_finite(Y):
        raise ValueError("it overflows")
    return ok


def commit(target: Tensor, value: Tensor, ok: Ok) -> None:
    """Write `value` into `target` where `ok`; a tensor `ok` never waits for the device."""
    target.copy_(value if isinstance(ok, bool) else torch.where(ok, value, target))


def store(state: dict[str, Any], key: str, value: Tensor, ok: Ok) -> None:
    """:func:`commit` to an entry of the state, which starts at 0."""
    if key not in state:
        state[key] = torch.zeros_like(value)
    commit(state[key], value, ok)


def _mark(p: Tensor) -> tuple:
    """What changes when somebody writes to `p`; an accelerator is not waited for.

    torch counts ``p.copy_``, but neither ``p.data = x`` (another storage) nor ``p.data.copy_``: on
    the CPU the sum of the entries tells that one.
    """
    storage: Any = p.untyped_storage()
    total = 0.0
    if p.device.type == "cpu":
        total = float(p.detach().sum(dtype=compute_dtype(p.dtype)))
    return p._version, storage._cdata, p.storage_offset(), tuple(p.shape), p.stride(), total


def _same_kind(known: geoopt.Manifold, now: geoopt.Manifold | None) -> bool:
    if now is known:
        return True
    return type(now) is type(known) and getattr(now, "point_shape", None) == getattr(
        known, "point_shape", None
    )
