"""Named adapters on the layers of a frozen model: put on, switched, merged and unmerged."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .._arguments import check_flag, check_integer, check_module, check_patterns, check_text
from .._replaced import note_frozen
from . import bases
from ._obstacles import Obstacles, check_model, has_hooks
from ._replace import after_replacing
from .adapted import AdaptedLayer
from .attention import LowRankMultiheadAttention
from .candidates import output_layer
from .change import Change
from .exchange import exchanged

logger = logging.getLogger("lrmanifold")
# They may read the weights of their layers and not call them.
_ATTENTIONS = (nn.MultiheadAttention, LowRankMultiheadAttention)


def adapt(
    model: nn.Module,
    rank: int,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    tau: float | None = 0.1,
    alpha: float | None = None,
    dropout: float = 0.0,
    name: str = "default",
    init: str = "random",
    dtype: torch.dtype | None = None,
    **geometry: Any,
) -> nn.Module:
    r"""Put a low-rank adapter on the linear layers of a model, in place, and freeze the rest.

    Each chosen layer W becomes an :class:`AdaptedLayer`: W x + b + ΔW x with
    ΔW = alpha/rank (U S Vᵀ - U₀ S₀ V₀ᵀ). Only U S Vᵀ is trained, with a condition number of at most
    1 + tau from the first step to the last. The subtracted start makes ΔW exactly 0 at first: the
    model's outputs stay *to the bit* what they were, with no factor at 0 (see
    :class:`LowRankAdapter` for the reasons and the cost).

    ``nn.Linear`` and its subclasses, transformers' ``Conv1D``, quantized layers and
    :class:`LowRankLinear` are adapted. Their weights are neither copied nor rewritten, and called
    as they are. Unless `include` names them, the output layer stays without an adapter, and so do
    parts of attentions of torch, layers with hooks (which would miss the adapter), and layers that
    are parametrized, compiled or read by other code, as that of :class:`ConvexPotential` is. What
    `include` names and cannot be adapted is named in a warning; the reasons also go to the logger
    "lrmanifold" at level INFO.

    Call it again with another `name` to put several adapters on one base. The new one is active,
    the others rest; :func:`set_adapter` switches.

    Parameters
    ----------
    model : nn.Module
    rank : int
        Cut to min(m, n) of each layer.
    include, exclude : str or sequence of str
        Glob patterns on qualified module names; all linear layers by default.
    tau : float or None
        Bound for the condition number of U S Vᵀ minus 1; None for no bound.
    alpha : float, optional
        ΔW is scaled by alpha / rank, as in LoRA; by 1 by default. The rank is that of the layer:
        rank=8, alpha=16 give the scale 2, but 16 / 3 on a layer with min(m, n) = 3. State dicts
        hold the scale, and loading one sets it.
    dropout : float
        Of the adapter's input, in training; the frozen layer sees the whole input.
    name : str
        Of the adapter, without a dot.
    init : {"random", "svd"}
        Where U S Vᵀ starts, as in :class:`LowRankAdapter`.
    dtype : torch.dtype, optional
        Of the adapter; the layer's by default, torch's default beside a quantized layer.
    **geometry
        `gradient` and `retraction` of :class:`LowRankLinear`.

    Returns
    -------
    nn.Module
        `model`; if `model` is itself a linear layer, the adapted one.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        If a pattern matches nothing, no layer can be adapted, an adapter of this name is there
        already or one is merged, or a value is out of range. Nothing is changed then.

    Examples
    --------
    >>> lrm.nn.adapt(model, rank=8, include="*.q_proj", alpha=16)
    >>> trained = [p for p in model.parameters() if p.requires_grad]
    >>> optimizer = lrm.optim.CondLRAdam(trained, lr=1e-3)
    >>> torch.save(lrm.nn.trained_state_dict(model), "adapter.pt")
    """
    check_model("model", model)
    rank, name = check_integer("rank", rank, low=1), _check_name(name)
    include, exclude = check_patterns("include", include), check_patterns("exclude", exclude)
    chosen = _chosen(model, include, exclude)
    for where, layer in chosen.items():
        if isinstance(layer, AdaptedLayer) and name in layer.changes:
            raise ValueError(
                f"name must be new, got {name!r}, an adapter that layer {where!r} has already"
            )
    _refuse_merged(model)
    options = {"tau": tau, "alpha": alpha, "dropout": dropout, "init": init, **geometry}
    changes = {w: _change(w, layer, rank, dtype, options) for w, layer in chosen.items()}
    replacements: dict[int, AdaptedLayer] = {}
    for where, layer in chosen.items():
        adapted = layer if isinstance(layer, AdaptedLayer) else AdaptedLayer(layer)
        adapted.changes[name] = changes[where].train(layer.training)
        replacements[id(layer)] = adapted
    model = _put(model, replacements)
    for p in model.parameters():
        p.requires_grad = False  # lazy parameters have no requires_grad_
    for _, layer in _adapted(model):
        layer.activate(name)
    return model


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make the adapter of this name count and train; the others rest, frozen.

    A layer without an adapter of this name computes as its base does. Build the optimizer anew, or
    give it the parameters of all adapters: one without a gradient does not move.

    Parameters
    ----------
    model : nn.Module
    name : str or None
        None for the base alone.

    Raises
    ------
    ValueError
        If no layer has an adapter of this name, or one is merged.
    """
    layers = _some_adapted(model)
    known = list(dict.fromkeys(key for layer in layers for key in layer.changes))
    if name is not None and check_text("name", name) not in known:
        raise ValueError(f"name must be None or one of {known}, got {name!r}")
    _refuse_merged(model)
    for layer in layers:
        layer.activate(name)


def merge(model: nn.Module, *, keep: bool = True) -> nn.Module:
    """Add the active adapter to the weights of its layers, in place: no cost in the forward pass.

    Each sum W + ΔW is formed in at least float32 and rounded once. The layers remember what they
    took up: :func:`unmerge` goes back. A merged model is not saved or loaded; for plain layers call
    :func:`lrmanifold.densify`, before or after merging. A merged adapter gets no gradients:
    training the rest of the model does not move it.

    Parameters
    ----------
    model : nn.Module
    keep : bool
        Keep a copy of each weight, so that :func:`unmerge` gives it back to the bit. Without, ΔW is
        subtracted again and W comes back to rounding.

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    ValueError
        If a layer cannot take it up: its base is quantized, low-rank or tied to another weight, or
        has hooks or a forward of its own, for which W + ΔW need not give the same function. If an
        adapter is merged already, or none is there or active. Nothing is changed then.
    """
    check_flag("keep", keep)
    layers = _some_adapted(model)
    _refuse_merged(model)
    if all(layer.active is None for layer in layers):
        raise ValueError("an adapter of model must be active to be merged, got none: set_adapter")
    why_tied = bases.tied(model)
    for name, layer in _adapted(model):
        if layer.active is None:
            continue
        if reason := layer.why_not_merge() or why_tied(layer.base_layer):
            raise ValueError(f"layer {name!r} cannot be merged: {reason}")
    for layer in layers:
        layer.fold(keep)
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Undo :func:`merge`: to the bit where a copy was kept, else to rounding.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    nn.Module
        `model`.

    Raises
    ------
    ValueError
        If nothing is merged.
    """
    layers = _some_adapted(model)
    if all(layer.merged is None for layer in layers):
        raise ValueError("an adapter of model must be merged to be unmerged, got none")
    for layer in layers:
        layer.unfold()
    return model


def _adapted(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield name, module


def _some_adapted(model: Any) -> list[AdaptedLayer]:
    layers = [layer for _, layer in _adapted(check_module("model", model))]
    if not layers:
        raise ValueError("model must have adapters, got none: call lrmanifold.nn.adapt first")
    return layers


def _refuse_merged(model: nn.Module) -> None:
    for name, layer in _adapted(model):
        if layer.merged is not None:
            raise ValueError(
                f"no adapter of model may be merged, got {layer.merged!r} in layer {name!r}: call "
                "lrmanifold.nn.unmerge first"
            )


def _check_name(name: Any) -> str:
    name = check_text("name", name)
    if not name or "." in name or hasattr(nn.ModuleDict, name) or name in vars(nn.ModuleDict()):
        raise ValueError(f"name must be a word without a dot, and none of torch's, got {name!r}")
    return name


def _chosen(
    model: nn.Module, include: tuple[str, ...] | None, exclude: tuple[str, ...] | None
) -> dict[str, nn.Module]:
    """The layers that get an adapter, by name; those with adapters already are among them."""
    found = dict(_all(model))
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatchcase(n, pattern) for n in found):
                raise ValueError(
                    f"{key} pattern {pattern!r} matches no linear layer; there are {list(found)}"
                )
    obstacles, head = Obstacles(model), output_layer(model)
    parts = {id(m) for a in model.modules() if isinstance(a, _ATTENTIONS) for m in a.modules()}
    chosen: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in found.items():
        named = any(fnmatchcase(name, p) for p in include or () if p != "*")
        if include is not None and not any(fnmatchcase(name, p) for p in include):
            continue
        if any(fnmatchcase(name, p) for p in exclude or ()):
            continue
        if name == head and not named:
            left[name] = "output layer: include names it to adapt it"
        elif reason := _reason(module, obstacles, parts):
            left[name] = reason
            if named:
                warnings.warn(f"adapt left alone {name or '(model)'}: {reason}", stacklevel=3)
        else:
            chosen[name] = module
    words = "; ".join(f"{n or '(model)'}: {reason}" for n, reason in left.items())
    logger.info("adapt: %d layers; left alone %s", len(chosen), words or "none")
    if not chosen:
        raise ValueError(
            f"model must have a linear layer to adapt, got none ({words or 'no such layer chosen'})"
        )
    return chosen


def _all(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, and adapted ones in their place; not what is inside of adapters."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, (AdaptedLayer, Change)):
            inside.update(id(m) for m in module.modules())
        if isinstance(module, AdaptedLayer) or bases.is_base(module):
            yield name, module


def _reason(module: nn.Module, obstacles: Obstacles, parts: set[int]) -> str:
    if isinstance(module, AdaptedLayer):
        return ""
    if id(module) in parts:
        return "part of an attention, which reads its weight"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy: run a batch through the model first"
    if reason := obstacles.of(module):
        return reason
    if module._parameters.get("weight") is None and isinstance(module, nn.Linear):
        return "its weight is computed by a hook (weight_norm, prune, ...)"
    return "it has hooks: register them after adapt" if has_hooks(module) else ""


def _change(
    where: str, layer: nn.Module, rank: int, dtype: torch.dtype | None, options: dict[str, Any]
) -> Change:
    base: Any = layer.base_layer if isinstance(layer, AdaptedLayer) else layer
    n, m = bases.sizes(base)
    device, own = bases.place_of(base)
    options = {**options, "weight": bases.matrix(base), "device": device, "dtype": dtype or own}
    try:
        return Change(n, m, min(rank, m, n), **options)
    except ValueError as error:
        raise ValueError(f"layer {where!r} cannot be adapted: {error}") from error


def _put(model: nn.Module, replacements: dict[int, AdaptedLayer]) -> nn.Module:
    for layer in replacements.values():  # frozen now: an optimizer of it moves no adapter
        note_frozen(layer.base_layer, layer.changes)
    found = exchanged(model, replacements)
    if found is model:
        after_replacing(model)
    return found
