"""Putting layers in the place of others: what belonged to the old one goes on to the new one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .._replaced import note_replaced
from . import bases
from ._carry import carry_over
from ._mismatch import keep_explaining
from ._obstacles import Obstacles, has_hooks, listed
from .adapted import AdaptedLayer
from .adapter import LowRankAdapter
from .attention import LowRankMultiheadAttention
from .embedding import LowRankEmbedding
from .exchange import exchanged
from .layer import LowRankLayer
from .linear import LowRankLinear
from .saver import mark


def replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put ``replacements[id(old)]`` in the place of each old module; `model` or its replacement."""
    for module in list(model.modules()):
        if id(module) in replacements:
            old, new = list(module.parameters()), replacements[id(module)]
            carry_over(module, new)
            note_replaced(old, new)
    found = exchanged(model, replacements)
    if found is model:
        after_replacing(model)
    return found


def after_replacing(model: nn.Module) -> None:
    """What the model around replaced layers has to know."""
    for parent in reversed(list(model.modules())):  # models in a model may share its configuration
        _avoid_fused_path(parent)
        mark(parent)
    keep_explaining(model)


def replace_low_rank(
    model: nn.Module,
    make: Callable[[Any], nn.Module],
    tie: Callable[[nn.Module, nn.Module], None],
    verb: str,
    *,
    needs_bias: bool,
    dense: bool = False,
) -> nn.Module:
    """Replace all low-rank layers and adapters by what `make` gives for each.

    With `dense`, `make` gives torch's layers, and a low-rank attention becomes torch's as a whole,
    unless something stands in the way of a part of it: then its parts are replaced one by one.

    Layers with a common weight get a common weight again, by ``tie(new, first)``. What cannot be
    replaced stays as it is, and a warning names it.
    """
    obstacles = Obstacles(model)
    adapters: list[Any] = [m for m in model.modules() if isinstance(m, LowRankAdapter)]
    inner = {id(m.update) for m in adapters}
    adapted = [m for m in model.modules() if isinstance(m, AdaptedLayer)]
    for module in adapted:  # replaced with what is in it
        inner.update(id(m) for m in module.modules() if m is not module)
    names = {id(m): name for name, m in model.named_modules()}
    whole = _attentions(model, obstacles) if dense else {}
    for attention in whole.values():  # replaced with what is in it
        inner.update(id(m) for m in attention.modules())
    adapters = [m for m in [*adapters, *adapted] if id(m) not in inner]
    layers = [m for m in model.modules() if isinstance(m, LowRankLayer) and id(m) not in inner]
    by_weight: dict[int, list[LowRankLayer]] = {}
    for layer in layers:
        by_weight.setdefault(id(layer.weight), []).append(layer)
    reasons = {
        id(m): _reason(m, obstacles, by_weight, needs_bias, dense) for m in [*adapters, *layers]
    }
    for group in by_weight.values():  # of tied layers all are replaced or none
        common = next((reasons[id(m)] for m in group if reasons[id(m)]), "")
        reasons.update({id(m): reasons[id(m)] or common for m in group})
    replacements: dict[int, nn.Module] = {key: m.to_dense() for key, m in whole.items()}
    replacements.update({id(m): _merged(m) for m in adapters if not reasons[id(m)]})
    for layer in layers:
        if not reasons[id(layer)]:
            replacements[id(layer)] = make(layer)
            first = by_weight[id(layer.weight)][0]
            if layer is not first:
                tie(replacements[id(layer)], replacements[id(first)])
    stayed = {names[key]: reason for key, reason in reasons.items() if reason}
    _say(verb, stayed, not reasons and not whole)
    model = replace(model, replacements)
    for adapter in adapters:
        new = replacements.get(id(adapter))
        # its weight is trainable again, as `merge` gives it; after `adapt` the model stays frozen
        single = new is not None and isinstance(adapter, LowRankAdapter)
        if single and adapter.bias is not None:
            adapter.bias.requires_grad_(True)
    return model


def _merged(adapter: Any) -> nn.Module:
    return adapter.to_dense() if isinstance(adapter, AdaptedLayer) else adapter.merge()


def _attentions(model: nn.Module, obstacles: Obstacles) -> dict[int, LowRankMultiheadAttention]:
    """The low-rank attentions that nothing keeps from being replaced as a whole."""
    found = {}
    for module in model.modules():
        if type(module) is LowRankMultiheadAttention and not obstacles.of(module):
            parts = [m for m in module.modules() if m is not module]
            tied = any(obstacles.ties.get((id(m), "weight")) for m in parts)
            stays = (obstacles.of(m) or has_hooks(m) or _of_weights(m, obstacles) for m in parts)
            if not tied and not any(stays):
                found[id(module)] = module
    return found


def _reason(
    module: nn.Module,
    obstacles: Obstacles,
    by_weight: Mapping[int, list[LowRankLayer]],
    needs_bias: bool,
    dense: bool,
) -> str:
    if reason := obstacles.of(module) or _own_function(module, dense):
        return reason
    if reason := _of_weights(module, obstacles):
        return reason
    if isinstance(module, AdaptedLayer):
        return _reason_of_adapted(module, obstacles)
    own = "weight" in vars(module) or module._parameters.get("weight") is None
    if own or (needs_bias and "bias" in vars(module)):
        return "its weight or bias is computed by a hook (weight_norm, prune, ...)"
    others = obstacles.ties.get((id(module), "weight"), [])
    if isinstance(module, LowRankAdapter):
        if others:
            return f"the weight it adapts is tied to {listed(others)}: merging would untie them"
        return ""
    group = by_weight[id(module.weight)]
    # a table of embeddings and its head have one dense weight; their folded factors differ
    same = (LowRankEmbedding, LowRankLinear) if dense else ()
    kinds = {(None if type(m) in same else type(m), m.dense_shape) for m in group if len(group) > 1}
    if len(others) > len(group) - 1 or len(kinds) > 1:
        return f"its weight shares memory with {listed(others)}"
    return ""


def _of_weights(module: nn.Module, obstacles: Obstacles) -> str:
    """Why one of a layer's weights must stay, or ""; an adapter has two: its base's and its own."""
    reasons = (obstacles.of_weight(m._parameters.get("weight")) for m in module.modules())
    return next(filter(None, reasons), "")


def _own_function(module: nn.Module, dense: bool) -> str:
    """Whether a subclass computes something else than the class whose conversion it inherits."""
    below: set[str] = set()
    for kind in type(module).__mro__:
        own = vars(kind)
        ours = kind.__module__.startswith(f"{__package__}.")
        if ours or (dense and "to_dense" in own):
            # of LowRankLayer there is no conversion to inherit
            if kind is not LowRankLayer and below & {"__call__", "forward", "_first", "_last"}:
                name = type(module).__name__
                return f"a subclass ({name}) with a forward of its own"
            break
        below.update(own)
    return ""


def _reason_of_adapted(module: AdaptedLayer, obstacles: Obstacles) -> str:
    base = module.base_layer
    if reason := bases.why_not_added(base):
        return reason
    if others := obstacles.ties.get((id(base), "weight")):
        return f"the weight it adapts is tied to {listed(others)}: merging would untie them"
    return obstacles.of(base)


def _say(verb: str, reasons: Mapping[str, str], none: bool) -> None:
    """Nothing silent: a warning names what stayed."""
    if none:
        warnings.warn(f"{verb} found no low-rank layer: nothing was changed", stacklevel=4)
    elif reasons:
        words = "; ".join(f"{name or '(model)'}: {reason}" for name, reason in reasons.items())
        warnings.warn(f"{verb} left alone {words}", stacklevel=4)


def _avoid_fused_path(module: nn.Module) -> None:
    """torch's fused encoder layer reads dense weights directly: avoid it around low-rank ones.

    Its encoder turns batches with padding into nested tensors for that path only. Both back when
    all layers are dense again.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        layers = (module.linear1, module.linear2)
        plain = all(isinstance(layer, nn.Linear) for layer in layers)
        if not (plain and isinstance(module.self_attn, nn.MultiheadAttention)):
            module.__dict__.setdefault("_fused_activation", module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0
        elif "_fused_activation" in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop("_fused_activation")
    elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
        if any(isinstance(m, LowRankMultiheadAttention) for m in module.modules()):
            module.__dict__.setdefault("_nested", module.use_nested_tensor)
            module.use_nested_tensor = False
        elif "_nested" in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop("_nested")
