"""What a state dict has low-rank and the model dense: said beside torch's words on sizes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .adapted import AdaptedLayer
from .kinds import kind_of, matrix_of
from .layer import LowRankLayer

_ADVICE = (
    "factorize this model as the saved one was, with the same rank and exclude, or by "
    "lrmanifold.nn.restructure"
)


def explain(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Hook before loading, of a model with low-rank layers: names what is low-rank there only.

    Raises
    ------
    RuntimeError
        If an adapter is merged. Here nothing has been loaded yet.
    """
    for name, layer in module.named_modules():
        place = f"{prefix}{name}." if name else prefix
        if isinstance(layer, AdaptedLayer):
            layer.refuse_merged("loaded")
        if isinstance(layer, nn.MultiheadAttention) and f"{place}q_proj.weight" in state_dict:
            error_msgs.append(
                f"{place[:-1]}: the attention is dense here, low-rank in the state dict; {_ADVICE}"
            )
        elif kind_of(layer) and not isinstance(layer, LowRankLayer):
            own, value = layer._parameters.get("weight"), state_dict.get(f"{place}weight")
            if own is not None and isinstance(value, Tensor) and value.shape != own.shape:
                (m, n), groups = matrix_of(layer)
                rank = value.shape[-1] if value.ndim >= 2 else 0
                lead = (groups,) if groups > 1 else ()
                if tuple(value.shape) == (*lead, m + rank + n, rank):
                    error_msgs.append(
                        f"{place}weight: the layer is dense here, {tuple(own.shape)}, and of rank "
                        f"{rank} of {m} x {n} in the state dict; {_ADVICE}"
                    )


def keep_explaining(model: nn.Module) -> None:
    """Give a model with low-rank layers the hook, and take it from modules that have none."""
    low = {id(m) for m in model.modules() if isinstance(m, LowRankLayer)}
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        ours = [key for key, hook in hooks.items() if getattr(hook, "hook", None) is explain]
        if ours and not any(id(m) in low for m in module.modules()):
            for key in ours:
                del hooks[key]
        elif module is model and low and not ours:
            module.register_load_state_dict_pre_hook(explain)
