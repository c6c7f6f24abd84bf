"""Putting layers in the place of others: what belonged to the old one goes on to the new one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ._carry import carry_over
from ._obstacles import Obstacles, listed
from .adapter import LowRankAdapter
from .layer import LowRankLayer


def replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put ``replacements[id(old)]`` in the place of each old module; `model` or its replacement."""
    for module in list(model.modules()):
        if id(module) in replacements:
            carry_over(module, replacements[id(module)])
    if id(model) in replacements:
        return replacements[id(model)]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
        _avoid_fused_path(parent)
    return model


def replace_low_rank(
    model: nn.Module,
    make: Callable[[Any], nn.Module],
    tie: Callable[[nn.Module, nn.Module], None],
    verb: str,
    *,
    needs_bias: bool,
) -> nn.Module:
    """Replace all low-rank layers and adapters by what `make` gives for each.

    Layers with a common weight get a common weight again, by ``tie(new, first)``. What cannot be
    replaced stays as it is, and a warning names it.
    """
    obstacles = Obstacles(model)
    adapters = [m for m in model.modules() if isinstance(m, LowRankAdapter)]
    inner = {id(m.update) for m in adapters}
    names = {id(m): name for name, m in model.named_modules()}
    layers = [m for m in model.modules() if isinstance(m, LowRankLayer) and id(m) not in inner]
    by_weight: dict[int, list[LowRankLayer]] = {}
    for layer in layers:
        by_weight.setdefault(id(layer.weight), []).append(layer)
    reasons = {id(m): _reason(m, obstacles, by_weight, needs_bias) for m in [*adapters, *layers]}
    for group in by_weight.values():  # of tied layers all are replaced or none
        common = next((reasons[id(m)] for m in group if reasons[id(m)]), "")
        reasons.update({id(m): reasons[id(m)] or common for m in group})
    replacements: dict[int, nn.Module] = {}
    replacements.update({id(m): m.merge() for m in adapters if not reasons[id(m)]})
    for layer in layers:
        if not reasons[id(layer)]:
            replacements[id(layer)] = make(layer)
            first = by_weight[id(layer.weight)][0]
            if layer is not first:
                tie(replacements[id(layer)], replacements[id(first)])
    _say(verb, {names[key]: reason for key, reason in reasons.items() if reason}, not reasons)
    model = replace(model, replacements)
    for adapter in adapters:
        new = replacements.get(id(adapter))
        if new is not None and adapter.bias is not None:
            adapter.bias.requires_grad_(True)  # that of `new` now, trainable as its weight is
    return model


def _reason(
    module: nn.Module,
    obstacles: Obstacles,
    by_weight: Mapping[int, list[LowRankLayer]],
    needs_bias: bool,
) -> str:
    if reason := obstacles.of(module):
        return reason
    own = "weight" in vars(module) or module._parameters.get("weight") is None
    if own or (needs_bias and "bias" in vars(module)):
        return "its weight or bias is computed by a hook (weight_norm, prune, ...)"
    others = obstacles.ties.get((id(module), "weight"), [])
    if isinstance(module, LowRankAdapter):
        if others:
            return f"the weight it adapts is tied to {listed(others)}: merging would untie them"
        return ""
    group = by_weight[id(module.weight)]
    kinds = {(type(m), m.dense_shape) for m in group if len(group) > 1}
    if len(others) > len(group) - 1 or len(kinds) > 1:
        return f"its weight shares memory with {listed(others)}"
    return ""


def _say(verb: str, reasons: Mapping[str, str], none: bool) -> None:
    """Nothing silent: a warning names what stayed."""
    if none:
        warnings.warn(f"{verb} found no low-rank layer: nothing was changed", stacklevel=4)
    elif reasons:
        words = "; ".join(f"{name or '(model)'}: {reason}" for name, reason in reasons.items())
        warnings.warn(f"{verb} left alone {words}", stacklevel=4)


def _avoid_fused_path(module: nn.Module) -> None:
    """torch's fused encoder layer reads ``linear1.weight`` as a dense matrix: avoid it.

    Back when both layers are dense again.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        layers = (module.linear1, module.linear2)
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            module.__dict__.setdefault("_fused_activation", module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0
        elif "_fused_activation" in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop("_fused_activation")
