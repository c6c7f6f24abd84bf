"""From a file into a model: everything is checked before anything changes."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .._arguments import check_callable, check_choice, check_flag, check_path
from ..nn import LowRankLayer
from ..nn.change import PARTS
from ..parameter import is_sharded
from ._file import CheckpointError, Payload, read
from ._layers import (
    changes,
    checked,
    defect,
    is_dense,
    low_rank_weights,
    not_finite,
    packed_from_dense,
    place_of,
    with_present_keys,
    with_tied_keys,
)

# State of an optimizer that has the shape of its parameter.
_SHAPED = ("momentum_buffer", "exp_avg")


class Loaded(NamedTuple):
    """What came out of a file beside the model's tensors."""

    extra: Any
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    from_dense: tuple[str, ...]


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    dense: Literal["refuse", "svd"] = "refuse",
    strict: bool = True,
    migrate: Callable[[Payload], Payload] | None = None,
) -> Loaded:
    """Load a checkpoint into a model, and an optimizer if one is given.

    Also reads files of others: a plain state dict, by ``torch.save`` or in safetensors, is a
    checkpoint of version 0. Ranks may differ from the model's: each layer, and each
    adapter, takes the file's. Damage to a file that :func:`save` wrote is always found, by its
    seal.

    Parameters
    ----------
    path : path
        A name ending in ``.safetensors`` is read as that format.
    model : nn.Module
        Of a compiled or DDP model the one inside is loaded.
    optimizer : torch.optim.Optimizer, optional
        Of this model's parameters.
    dense : {"refuse", "svd"}
        What to do with a dense weight for a layer that is low-rank here, as in the checkpoint of a
        model from before :func:`lrmanifold.factorize`: an error, or the truncated SVD of the
        layer's rank, projected to its bound on the condition number.
    strict : bool
        Whether keys that only the model or only the file has are an error.
    migrate : callable, optional
        Your own changes of format: called with the payload, a dict with the keys "model" (state
        dict), "optimizer", "extra" and "geometry", after older versions of the file format have
        been brought to the present one; returns it. For renamed modules, say.

    Returns
    -------
    Loaded
        ``extra`` as given to :func:`save`; keys ``missing`` in the file and ``unexpected`` in the
        model (both empty if strict); ``from_dense``, the keys that went through an SVD.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong kind.
    CheckpointError
        If the file is damaged or does not fit, naming each key. Model and optimizer are as before:
        the model's state is copied to the CPU first, to go back to.
    """
    check_choice("dense", dense, ("refuse", "svd"))
    check_flag("strict", strict)
    if migrate is not None:
        check_callable("migrate", migrate, "a function from payload to payload")
    path, model, optimizer = checked(path, model, optimizer)
    payload = read(path)
    if migrate is not None:
        payload = migrate(payload)
        if not isinstance(payload, Mapping) or not isinstance(payload.get("model"), Mapping):
            raise TypeError("migrate must return the payload, a dict with a state dict in 'model'")
    payload = _without_wrappers(model, dict(payload))
    payload["model"] = with_tied_keys(model, with_present_keys(model, payload["model"]))
    state, converted, problems = _fitted(model, payload, dense)
    own = set(model.state_dict())
    missing = tuple(sorted(own - set(payload["model"])))
    unexpected = tuple(sorted(set(payload["model"]) - own))
    if strict:
        problems += [f"{key!r} is missing in the file" for key in missing]
        problems += [f"{key!r} is in the file, but not in the model" for key in unexpected]
    if optimizer is not None:
        problems += _optimizer_problems(optimizer, payload.get("optimizer"), model, state)
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{path}: does not fit:{shown}{more}")
    whole = OrderedDict(state)
    if payload.get("metadata"):
        whole._metadata = payload["metadata"]  # type: ignore[attr-defined]
    try:
        _load_all(model, whole, optimizer, payload.get("optimizer"))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: does not fit: {error}") from error
    return Loaded(payload.get("extra"), missing, unexpected, converted)


def peek(path: str | os.PathLike[str]) -> Any:
    """The `extra` of a checkpoint, without a model to load into.

    Raises
    ------
    CheckpointError
        If there is no such file or it is damaged.
    """
    return read(Path(check_path("path", path))).get("extra")


def _load_all(
    model: nn.Module,
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None,
    saved: Any,
) -> None:
    """All or nothing: a layer or an optimizer may refuse its state only when it sees it."""
    before = {k: _kept(v) for k, v in model.state_dict().items() if not nn.parameter.is_lazy(v)}
    try:
        model.load_state_dict(state, strict=False)
        if optimizer is not None:
            optimizer.load_state_dict(saved)
    except BaseException:
        model.load_state_dict(before, strict=False)
        raise


def _kept(value: Any) -> Any:
    """A copy to go back to, on the CPU: a second model may not fit on the device."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if value.is_meta or is_sharded(value):
        return value.clone()
    return value.detach().to("cpu", copy=True)


def _without_wrappers(model: nn.Module, payload: dict[str, Any]) -> dict[str, Any]:
    """The payload without the prefix that a compiled or DDP model gave to every key."""
    own = model.state_dict().keys()
    for prefix in ("_orig_mod.", "module.") * 2:  # one around the other, in either order
        state = payload["model"]
        wrapped = state and all(isinstance(k, str) and k.startswith(prefix) for k in state)
        if wrapped and not any(key.startswith(prefix) for key in own):
            payload["model"] = {k.removeprefix(prefix): v for k, v in state.items()}
    return payload


def _fitted(
    model: nn.Module, payload: Mapping[str, Any], dense: str
) -> tuple[dict[str, Tensor], tuple[str, ...], list[str]]:
    """The state to load, the keys that were factorized, and what does not fit."""
    layers, own, adapters = low_rank_weights(model), model.state_dict(), changes(model)
    starts = {f"{prefix}start" for prefix in adapters}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state, converted, problems = dict(payload["model"]), [], []
    for key, value in payload["model"].items():
        if not isinstance(value, Tensor):
            problems.append(f"{key!r} must be a tensor, got {type(value).__name__}")
        elif key in layers and not is_dense(layers[key], value):
            reason = defect(layers[key], value)
            if reason is not None:
                problems.append(f"{key!r} is not a point of {layers[key].manifold}: {reason}")
        elif key in layers and dense == "refuse":
            problems.append(
                f"{key!r} is a dense weight, {tuple(value.shape)}, and the layer is low-rank here, "
                f"{_rank_of(layers[key])}: dense='svd' factorizes it"
            )
        elif key in layers:
            try:
                state[key] = packed_from_dense(layers[key], value)
            except ValueError as error:
                problems.append(f"{key!r} cannot be factorized: {error}")
            converted.append(key)
        elif isinstance(own.get(key), Tensor):
            known = payload.get("geometry", {})
            any_shape = key in starts or nn.parameter.is_lazy(own[key])
            if not any_shape and own[key].shape != value.shape:
                problems.append(_wrong_shape(key, own[key], value, known))
            else:
                problems += _unlike(key, own[key], value, key in parameters)
    for prefix, change in adapters.items():
        if reason := change.why_not_loaded({k: state.get(prefix + k) for k in PARTS}):
            problems.append(f"{prefix}{reason}")
    problems += _untied(own, state)
    return state, tuple(converted), problems


def _unlike(key: str, own: Tensor, value: Tensor, parameter: bool) -> list[str]:
    """Why a tensor of the file cannot be the value of one of the model, whatever its shape."""
    if nn.parameter.is_lazy(own):
        return []
    kinds = [(x.is_complex(), x.is_floating_point()) for x in (own, value)]
    if kinds[0] != kinds[1]:
        return [f"{key!r} must be of a type like {own.dtype}, got {value.dtype}"]
    if own.is_meta:
        return [f"{key!r} is on the meta device here: give the model memory first, by to_empty()"]
    # in the model's dtype: what is large in the file may be Inf there
    reason = not_finite(value if own.is_quantized else value.to(own.dtype), parameter)
    return [] if reason is None else [f"{key!r} {reason}"]


def _untied(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are one in the model and several in the file: the last would win, silently."""
    first: dict[tuple, str] = {}
    problems = []
    for key, value in own.items():
        place = place_of(value)
        if key not in state or place is None:
            continue
        other = first.setdefault(place, key)
        if other != key and not torch.equal(state[key], state[other]):
            problems.append(f"{key!r} and {other!r} are one tensor here, but not in the file")
    return problems


def _rank_of(layer: LowRankLayer) -> str:
    return f"rank {layer.rank} of {layer.manifold.m} x {layer.manifold.n}"


def _wrong_shape(key: str, own: Tensor, value: Tensor, geometry: Mapping[str, Any]) -> str:
    words = f"{key!r} must have shape {tuple(own.shape)}, got {tuple(value.shape)}"
    if key in geometry:
        known = geometry[key]
        words += (
            f", the packed weight of a low-rank layer (rank {known.get('rank')} of "
            f"{known.get('m')} x {known.get('n')}): factorize the model before loading, with the "
            "same rank and exclude"
        )
    return words


def _optimizer_problems(
    optimizer: torch.optim.Optimizer,
    saved: Any,
    model: nn.Module,
    state: Mapping[str, Tensor],
) -> list[str]:
    """What ``optimizer.load_state_dict`` would refuse, or take and fail with later."""
    if not isinstance(saved, Mapping):
        return ["the file holds no optimizer"]
    if not _is_optimizer_state(saved):
        return ["'optimizer' is no state dict of an optimizer"]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    found = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != found:
        return [f"'optimizer' must have groups of {sizes} parameters, got {found}"]
    names = {id(p): name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [k for group in saved["param_groups"] for k in group["params"]]
    problems = []
    for k, p in zip(ids, params, strict=True):
        name = names.get(id(p), f"parameter {k}")
        shape = state[name].shape if name in state else p.shape
        for key in _SHAPED:
            entry = saved["state"].get(k)
            value = entry.get(key) if isinstance(entry, Mapping) else None
            if isinstance(value, Tensor) and value.shape != shape:
                problems.append(
                    f"the optimizer's {key!r} of {name!r} must have shape {tuple(shape)}, got "
                    f"{tuple(value.shape)}"
                )
    return problems


def _is_optimizer_state(saved: Mapping[str, Any]) -> bool:
    groups = saved.get("param_groups")
    return (
        isinstance(saved.get("state"), Mapping)
        and isinstance(groups, (list, tuple))
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
    )
