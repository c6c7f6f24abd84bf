"""What every optimizer here is: options that are checked, geometry that is remembered, a rule."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._arguments import (
    check_callable,
    check_flag,
    check_number,
    check_numbers,
    check_rate,
    check_tensor,
    shown,
)
from ..manifolds import FixedRank
from ..parameter import gathered, is_sharded, manifold_of, sharded_like
from ..precision import check_float64
from ._watch import SkipWatch
from .accelerator import is_accelerated
from .arithmetic import PlainArithmetic
from .coordinates import is_factored
from .distributed import move_sharded, move_shared_out
from .engine import Engine
from .geometry import GeometryMemory, check_apart, check_vector
from .items import Item, Rule
from .loading import brought_over, checked_state, completed, marked
from .velocities import tangent_of_velocity

# Options of torch's optimizers that do not exist here: in a group they would be ignored in silence.
_UNSUPPORTED = frozenset({"foreach", "fused", "differentiable", "dampening", "amsgrad"})

# torch.compiler.disable imports torch's compiler, which takes as long as torch; this one, torch's
# own for its optimizers, waits for the first call.
_uncompiled = getattr(torch, "_disable_dynamo", torch.compiler.disable)


class GeometricOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: moves each parameter, on the manifold that it is on, by a rule.

    A new optimizer is a subclass with a `rule` and, in `defaults`, at least ``lr``; see
    ``docs/extending.md``. Everything else is here: options are checked, lost manifolds refused,
    NaN and Inf skipped and counted, equal weights bundled, accelerators never waited for.

    Parameters
    ----------
    params : iterable
        Parameters, named parameters, or groups. Messages call parameters by the names that
        ``model.named_parameters()`` or :func:`param_groups` gives with them.
    defaults : dict
        Options with their values.
    distribute : bool
        Share the steps of low-rank weights out over the ranks of the default process group.
    """

    rule: Rule
    # Options that must be finite and non-negative; those that must be True or False.
    _numbers: tuple[str, ...] = ("lr", "weight_decay", "penalty")
    _flags: tuple[str, ...] = ("maximize", "skip_nonfinite", "penalty_squared", "capturable")

    def __init__(self, params: Any, defaults: dict[str, Any], *, distribute: bool = False) -> None:
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"params must be parameters, got {shown(params)}: give model.parameters(), "
                "model.named_parameters() or lrmanifold.optim.param_groups(model)"
            )
        self._distribute = check_flag("distribute", distribute)
        self._start()
        super().__init__(params, defaults)

    def _start(self) -> None:
        # Caches: results do not depend on them.
        self._memory, self._engine = GeometryMemory(), Engine(self.rule)
        self._skips = SkipWatch()

    # -- groups and options

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; remembers the manifold of each of its parameters."""
        super().add_param_group(param_group)
        try:
            self._check_options(self.param_groups[-1])
            self._check_groups(self.param_groups)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        self._memory.add_group(self.param_groups[-1]["params"])

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise for options out of range; numbers become Python's own."""
        for key in sorted(_UNSUPPORTED):
            if group.get(key):
                name = type(self).__name__
                raise TypeError(f"{key} is not an option of {name}, got {group[key]!r}")
        for key in self._numbers:
            if key in group:
                group[key] = check_rate(key, group[key], low=0.0)
        for key in self._flags:
            if key in group:
                group[key] = check_flag(key, group[key])
        share: dict[str, Any] = {"low": 0.0, "high": 1.0, "open_high": True}
        if "momentum" in group:
            group["momentum"] = check_number("momentum", group["momentum"], **share)
        if "betas" in group:
            group["betas"] = check_numbers("betas", group["betas"], 2, **share)
        margin = group.get("clip_margin", 0.0)
        check_number("clip_margin", margin, low=0.0, high=1.0, open_high=True)
        for p in group["params"]:
            self._check_parameter(group, p, manifold_of(p))
        if group.get("capturable"):
            # In a captured graph a number is a constant, and so is a tensor of the host, as a file
            # brings it: schedulers write into a tensor of the device.
            group["lr"] = torch.as_tensor(group["lr"], device=group["params"][0].device)

    def _check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Raise for groups that cannot be in one optimizer."""

    def _check_parameter(self, group: dict[str, Any], p: Tensor, manifold: Any) -> None:
        if group.get("capturable") and not is_accelerated(p):
            raise ValueError(
                f"capturable must be False for parameters on {p.device}: only steps on an "
                "accelerator can be captured"
            )
        if manifold is None:
            return
        check_float64("params", p)
        if group.get("clip_margin") and not takes_margin(manifold):
            raise ValueError(
                f"clip_margin must be 0 for parameters on {manifold.name}, whose project_core "
                f"takes no margin, got {group['clip_margin']}"
            )
        if p.is_complex():
            raise TypeError(
                f"params must be real where they are on a manifold, got one of {p.dtype} on "
                f"{manifold.name}"
            )
        if not isinstance(manifold, FixedRank) and (
            group.get("weight_decay") or group.get("penalty")
        ):
            raise ValueError(
                f"weight_decay and penalty must be 0 for parameters on {manifold.name}: they act "
                "on the core of a low-rank weight; put the parameter in a group of its own"
            )

    # -- copies and files

    def __getstate__(self) -> dict[str, Any]:
        # With the memory of manifolds: a copy must still notice one that was lost before copying.
        geometry = self._memory.manifolds
        return {**super().__getstate__(), "_geometry": geometry, "_distribute": self._distribute}

    def __setstate__(self, state: dict[str, Any]) -> None:
        geometry = state.pop("_geometry", None)
        known = self.__dict__.get("_memory")
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it; a resumed run must not have more
        if known is None or geometry is not None:
            self._start()
            self._memory.manifolds = geometry or []
        self._memory.marks = {}
        # A state saved by torch.optim.SGD, or by an older version, lacks some options.
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and under "velocities" whether a low-rank weight's momentum is one.

        See :meth:`momentum`; ``torch.distributed.checkpoint`` does not save this entry.
        """
        return marked(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; continues bit for bit where the saved optimizer stopped.

        State of ``torch.optim.AdamW`` (or SGD) of ordinary parameters is taken up by
        :class:`CondLRAdam` (:class:`CondLR`). Files of earlier versions are brought over; options
        that a file does not have stay as they are in the group. Load the
        model's state dict first: a momentum that was saved with another kind of retraction is
        converted at the point where the weight is. Earlier versions did not say with which.

        Raises
        ------
        TypeError, ValueError
            Before anything changes: for options out of range, entries that are missing, have
            another shape or hold NaN, or belong to another optimizer, also one with the same names
            in another order.
        """
        # Hooks may replace the dict: torch's own would run after we have looked at it.
        for hook in list(self._optimizer_load_state_dict_pre_hooks.values()):
            found = hook(self, state_dict)
            state_dict = state_dict if found is None else found
        state_dict = completed(self, brought_over(state_dict))
        entries = checked_state(self, state_dict)
        before = self._optimizer_load_state_dict_pre_hooks
        after = self._optimizer_load_state_dict_post_hooks
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        try:
            super().load_state_dict(state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = before
            self._optimizer_load_state_dict_post_hooks = after
        # torch casts all state to the parameter's dtype, and may alias what it was given.
        for p, state in entries.items():
            self.state[p] = state
        for group in self.param_groups:
            self._check_options(group)
        for notify in after.values():
            notify(self)

    @property
    def skipped_steps(self) -> int:
        """Number of steps left out for NaN or Inf: the largest number of any parameter.

        ``state[p]["skipped"]`` is that of one parameter. Waits for the device.
        """
        return max((int(s["skipped"]) for s in self.state.values() if "skipped" in s), default=0)

    # -- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step from the gradients present; parameters without a gradient stay as they are.

        On the CPU it is made whole or not at all, but for parameters whose gradient holds NaN or
        Inf: those alone are left out. A point is measured at its first step and after
        somebody else wrote to it; on an accelerator only then does the host wait for the device.
        There, a write through ``p.data`` that keeps the storage goes unseen; on the CPU a weighted
        sum of the entries tells it.

        Parameters
        ----------
        closure : callable, optional
            Re-evaluates the model and returns the loss; called once, with gradients enabled.

        Raises
        ------
        GeometryError
            If a parameter lost its manifold, or is off it by more than rounding.
        ValueError
            If two parameters share their memory, or a state belongs to another rank.
        FloatingPointError
            On the CPU, if a step is so long that it overflows or loses rank.
        """
        if closure is not None:
            check_callable("closure", closure, "a function that returns the loss")
        arithmetic = PlainArithmetic(p.device.type for g in self.param_groups for p in g["params"])
        with arithmetic.plain():
            loss = self._advance(closure, arithmetic)
        self._look_for_skips()
        return loss

    @_uncompiled
    def _look_for_skips(self) -> None:
        self._skips.look(self)

    def _advance(self, closure: Callable[[], Any] | None, arithmetic: PlainArithmetic) -> Any:
        loss = None if closure is None else arithmetic.evaluate(closure)
        self._move()
        return loss

    # Eager also within torch.compile: size-dependent branches and write tracking break the graph.
    # Compiled, 12 layers took 119 graphs with 129 breaks and minutes.
    @_uncompiled
    def _move(self) -> None:
        """Move every parameter that has a gradient."""
        items = list(self._items())
        check_apart((item.key, item.label) for item in items)
        sharded = [item for item in items if is_sharded(item.key)]
        whole = [item for item in items if not is_sharded(item.key)]
        if self._distribute:
            move_shared_out(self._engine, whole, self._ensure)
        else:
            for item in whole:
                self._ensure(item)
            self._engine.move(whole)
        for item in whole:
            if item.manifold is not None:
                self._memory.settle(item.key, item.point)
        move_sharded(self._engine, self._memory, sharded)

    def _items(self) -> Iterator[Item]:
        for group, p, manifold, label in list(self._memory.entries(self.param_groups)):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(
                    f"sparse gradients are not supported, got one for {label}: build its "
                    "nn.Embedding with sparse=False, or give it to torch.optim.SparseAdam"
                )
            state = self._state_of(p)
            # of a shape that is off the manifold the geometry speaks, below
            fits = tuple(p.shape[-2:]) == getattr(manifold, "point_shape", tuple(p.shape[-2:]))
            for key in self.rule.vectors if fits else ():
                if key in state:
                    check_vector(key, state[key], p, label)
            yield Item(group, p, p.detach(), p.grad.detach(), manifold, label, state)

    def _ensure(self, item: Item) -> None:
        if item.manifold is not None:
            self._memory.ensure_on_manifold(
                item.key, item.point, item.manifold, item.state["step"], item.label
            )

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = self.state[p]
        for key in ("step", "skipped"):
            if key not in state:
                state[key] = torch.zeros((), dtype=torch.int64, device=p.device)
        return state

    def momentum(self, p: Tensor) -> Tensor:
        """The momentum of a parameter: a tangent vector at its present point, 0 before a step.

        Where Adam moves a parameter it is the first moment, without the bias correction that a
        step divides by. 0 always for optimizers that remember no direction.

        The state keeps it in coordinates that suit the step: on a low-rank weight with the
        retraction "factored" ``state[p]["momentum_buffer"]`` holds velocities of the factors,
        packed, as they were at the point before. ``state[p]["exp_avg"]`` is the vector itself.

        Parameters
        ----------
        p : Tensor
            A parameter of this optimizer.

        Returns
        -------
        Tensor, shape of `p`
            Packed for low-rank weights. Of a sharded parameter sharded like it; all its processes
            have to ask together.

        Raises
        ------
        TypeError, ValueError
            If `p` is none of the optimizer's parameters, or its momentum belongs to another rank.
        """
        check_tensor("p", p, real=False)
        if not any(p is q for group in self.param_groups for q in group["params"]):
            raise ValueError(
                f"p must be a parameter that this {type(self).__name__} moves, got {shown(p)} in "
                "none of its groups: was the model converted after the optimizer was built?"
            )
        state: dict[str, Any] = self.state.get(p, {})
        manifold: Any = manifold_of(p)
        key = next((k for k in ("momentum_buffer", "exp_avg") if k in state), None)
        if key is None:
            return torch.zeros_like(p.detach())
        buffer = state[key]
        check_vector(key, buffer, p, "p")
        if key == "exp_avg" or not is_factored(manifold):
            return buffer.clone()
        found = tangent_of_velocity(manifold, gathered(p.detach()), gathered(buffer))
        return sharded_like(p, found) if is_sharded(p) else found


def takes_margin(manifold: Any) -> bool:
    """Whether the projection of cores of `manifold` can be asked for a point further inside."""
    project = getattr(manifold, "project_core", None)
    return project is None or "margin" in inspect.signature(project).parameters
