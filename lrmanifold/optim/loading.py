"""State of an optimizer from a file: brought over from other versions, and checked before use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._arguments import check_flag, shown
from ..factors import pack
from ..manifolds import FixedRank
from ..parameter import gathered, is_sharded, manifold_of, sharded_like
from ..precision import compute_dtype
from .coordinates import is_factored
from .geometry import Label
from .velocities import tangent_of_velocity, velocity_of_tangent

if TYPE_CHECKING:
    from .optimizer import GeometricOptimizer

_COUNTERS = ("step", "skipped")
# What version 0.1 kept beside a velocity; the projection at the next step makes them needless.
_OLD_STATE = ("momentum_overlap", "momentum_drift")
# What may be kept as velocities, and what a state dict says about it.
_MOMENTUM, _MARK = "momentum_buffer", "velocities"
_OLD_OPTIONS = ("orthonormality_tol",)


def marked(optimizer: GeometricOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """With an entry that tells whether momenta of low-rank weights are velocities of the factors.

    Beside "state" and "param_groups": ``torch.distributed.checkpoint`` demands of a file every key
    within these, and files of earlier versions have no mark.
    """
    found: dict[Any, bool] = {}
    for packed, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for key, p in zip(packed["params"], group["params"], strict=True):
            M = manifold_of(p)
            if isinstance(M, FixedRank) and _MOMENTUM in state_dict["state"].get(key, {}):
                found[key] = is_factored(M)
    return {**state_dict, _MARK: found}


def brought_over(state_dict: Any) -> dict[str, Any]:
    """A state dict of an earlier version in the present form; a shallow copy."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict, got {shown(state_dict)}")
    for key, kind in (("state", Mapping), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(
                f"state_dict must hold a {kind.__name__.lower()} under {key!r}, as "
                f"optimizer.state_dict() returns it, got {shown(state_dict.get(key))}"
            )
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(
                f"param_groups of state_dict must be dicts with a list under 'params', number {i} "
                f"is {shown(group)}"
            )
    groups = [
        {k: v for k, v in g.items() if k not in _OLD_OPTIONS} for g in state_dict["param_groups"]
    ]
    states = {}
    for key, state in state_dict["state"].items():
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of parameter {key} must be a dict, got {shown(state)}")
        states[key] = {k: v for k, v in state.items() if k not in _OLD_STATE and v is not None}
    return {**state_dict, "param_groups": groups, "state": states}


def completed(optimizer: GeometricOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """With what a file's groups do not say: options that they lack, names as they are here.

    Raises
    ------
    ValueError
        If the same names are there in another order: state goes by place, as in torch.
    """
    saved, groups = state_dict["param_groups"], optimizer.param_groups
    old, new = _names(saved), _names(groups)
    if old != new and set(old) == set(new):
        there, here = next(pair for pair in zip(old, new, strict=True) if pair[0] != pair[1])
        raise ValueError(
            "state_dict must have the optimizer's parameters in the same order, got "
            f"{there!r} in the place of {here!r}: build the optimizer as the saved one was"
        )
    filled = []
    for x, group in zip(saved, groups, strict=False):
        own = {k: v for k, v in group.items() if k in optimizer.defaults}
        names = {k: v for k, v in group.items() if k == "param_names"}
        filled.append({**own, **x, **names})
    return {**state_dict, "param_groups": filled + saved[len(filled) :]}


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for group in groups for name in group.get("param_names") or ()]


def checked_state(
    optimizer: GeometricOptimizer, state_dict: Mapping[str, Any]
) -> dict[Tensor, dict[str, Any]]:
    """The state of each parameter, in copies on its device.

    Raises
    ------
    TypeError, ValueError
        For what :meth:`GeometricOptimizer.load_state_dict` refuses; nothing has changed then.
    """
    saved, groups = state_dict["param_groups"], optimizer.param_groups
    sizes, wanted = ([len(g["params"]) for g in gs] for gs in (saved, groups))
    if sizes != wanted:
        raise ValueError(
            f"state_dict must have groups of {wanted} parameters, as the optimizer has, got "
            f"{sizes}: was the model factorized as the saved one, with the same rank and exclude?"
        )
    marks = state_dict.get(_MARK, {})
    if not isinstance(marks, Mapping):
        raise ValueError(f"{_MARK} of state_dict must be a dict of flags, got {shown(marks)}")
    optimizer._check_groups(saved)
    found: dict[Tensor, dict[str, Any]] = {}
    for g, (old, group) in enumerate(zip(saved, groups, strict=True)):
        options = {**optimizer.defaults, **old, "params": group["params"]}
        optimizer._check_options(options)
        if old.get("decoupled_weight_decay") is False and old.get("weight_decay"):
            raise ValueError(
                "state_dict must come from AdamW where weight_decay is set, got one of Adam, whose "
                "decay is part of the gradient"
            )
        for i, (key, p) in enumerate(zip(old["params"], group["params"], strict=True)):
            if key in state_dict["state"]:
                label = Label(group, g, i)
                state, mark = state_dict["state"][key], marks.get(key)
                found[p] = _entry(optimizer, options, p, state, mark, label)
    return found


def _entry(
    optimizer: GeometricOptimizer,
    options: Any,
    p: Tensor,
    state: Mapping[str, Any],
    mark: bool | None,
    label: Label,
) -> dict[str, Any]:
    rule, M, name = optimizer.rule, manifold_of(p), type(optimizer).__name__
    if not state:
        return {}
    if M is not None and "skipped" not in state:
        raise ValueError(
            f"the state of {label} must come from an optimizer of lrmanifold, as it is on "
            f"{M.name}, got entries {sorted(state)}: start {name} without it"
        )
    known = {*_COUNTERS, *rule.known(M)}
    if not set(state) <= known:
        raise ValueError(
            f"the state of {label} must have entries of {name}, {sorted(known)}, "
            f"got {sorted(state)}"
        )
    used = tuple(key for key in rule.known(M) if key in state)
    if used and not set(rule.names(options, M)) <= set(used):
        raise ValueError(f"the state of {label} must have all entries of {name}, got only {used}")
    entry: dict[str, Any] = {}
    for key in _COUNTERS:
        count = torch.as_tensor(state.get(key, 0))
        if count.ndim or count.is_complex() or not (count.is_meta or 0 <= float(count) < 2**53):
            raise ValueError(f"{key} of {label} must be a whole number >= 0, got {shown(count)}")
        entry[key] = count.to(device=p.device, dtype=torch.int64, copy=True)
    for key in used:
        entry[key] = _tensor(p, M, key, state[key], key in rule.moments, label)
    if (
        mark is not None
        and _MOMENTUM in entry
        and isinstance(M, FixedRank)
        and check_flag(f"{_MARK} of {label}", mark) != is_factored(M)
    ):
        entry[_MOMENTUM] = _converted(M, p, entry[_MOMENTUM], label)
    return entry


def _converted(M: FixedRank, p: Tensor, b: Tensor, label: Label) -> Tensor:
    """A momentum in the coordinates of the retraction of `M`, from the other ones."""
    if b.is_meta or p.is_meta:
        raise ValueError(
            f"{_MOMENTUM} of {label} was saved with another retraction than {M.retraction!r}: it "
            "can be converted only where the parameter has values, got the device meta"
        )
    X, whole = gathered(p.detach()), gathered(b)
    if not is_factored(M):
        found = tangent_of_velocity(M, X, whole)
    else:
        wide = compute_dtype(p.dtype)
        point, xi = M.unpack(X.to(wide)), M.unpack(whole.to(wide))
        bent = max(float((Q.mT @ Z).norm()) for Q, Z in ((point.U, xi.U), (point.V, xi.V)))
        if bent > torch.finfo(p.dtype).eps ** 0.5 * float(whole.norm()):
            raise ValueError(
                f"{_MOMENTUM} of {label} must be tangent at the parameter, as it was saved with "
                f"another retraction than {M.retraction!r}: load the model's state dict first"
            )
        found = pack(*velocity_of_tangent(point, xi)).to(p.dtype)
    return sharded_like(p, found) if is_sharded(p) else found


def _tensor(p: Tensor, M: Any, key: str, value: Any, moment: bool, label: Label) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{key} of {label} must be a tensor, got {shown(value)}")
    shape = tuple(p.shape)
    if moment and M is not None:
        shape = (*shape[:-2], 3) if isinstance(M, FixedRank) else tuple(value.shape)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{key} of {label} must have shape {shape}, got {tuple(value.shape)}{_why(M, value)}"
        )
    if not (is_sharded(value) or value.is_meta or bool(torch.isfinite(value).all())):
        raise ValueError(f"{key} of {label} must be finite, got NaN or Inf")
    dtype = compute_dtype(p.dtype) if moment else p.dtype
    return value.detach().to(device=p.device, dtype=dtype, copy=True)


def _why(M: Any, value: Tensor) -> str:
    """A way out where only the ranks differ: those of the model follow its own state dict."""
    if not isinstance(M, FixedRank) or value.ndim < 2:
        return ""
    r = value.shape[-1]
    alike = value.shape[-2] == M.m + r + M.n
    return f", of rank {r} instead of {M.rank}: load the model's state dict first" if alike else ""
