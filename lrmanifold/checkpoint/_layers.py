"""What a tensor of a checkpoint is to a low-rank layer: a point, a dense weight, or neither."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import check_instance, check_module, check_path
from .._wrappers import unwrapped
from ..nn import Change, LowRankLayer, LowRankMultiheadAttention
from ..parameter import is_sharded
from ..precision import storage_tolerance


def checked(
    path: object, model: object, optimizer: object
) -> tuple[Path, nn.Module, torch.optim.Optimizer | None]:
    """Checked arguments; the model without wrappers like DDP."""
    if optimizer is not None:
        check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    module = unwrapped(check_module("model", model))
    return Path(check_path("path", path)), module, optimizer  # type: ignore[return-value]


def low_rank_weights(model: nn.Module) -> dict[str, LowRankLayer]:
    """The low-rank layers by the key of their weight in the state dict, shared ones under each."""
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LowRankLayer)
    }


def changes(model: nn.Module) -> dict[str, Change]:
    """The changes of adapters by the prefix of their keys, shared ones under each."""
    return {
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Change)
    }


def with_present_keys(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of an older or a dense model with the keys that this model has for it."""
    state = with_split_attention(model, state)
    for prefix, change in changes(model).items():
        change.rename_old_keys(state, prefix)
    return state


def with_split_attention(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict whose dense attentions have a weight for each projection that is one here."""
    state = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, LowRankMultiheadAttention):
            continue
        prefix = f"{name}." if name else ""
        whole = state.get(f"{prefix}in_proj_weight")
        if isinstance(whole, Tensor) and whole.ndim == 2 and len(whole) == 3 * module.embed_dim:
            del state[f"{prefix}in_proj_weight"]
            for part, weight in zip("qkv", whole.chunk(3), strict=True):
                state[f"{prefix}{part}_proj.weight"] = weight
        for part in "qkv":
            if isinstance(state.get(f"{prefix}{part}_proj_weight"), Tensor):
                weight = state.pop(f"{prefix}{part}_proj_weight")
                state[f"{prefix}{part}_proj.weight"] = weight
    return state


def place_of(value: Any) -> tuple | None:
    """Where a tensor of a state dict lies, the same for tied ones; None if nothing lies there."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    if not plain or nn.parameter.is_lazy(value) or value.is_meta or is_sharded(value):
        return None
    if not value.numel():
        return None
    return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device


def with_tied_keys(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict also with the keys whose tensor is that of another one, and written once.

    ``safetensors.torch.save_model`` leaves them out.
    """
    places = {key: place_of(value) for key, value in model.state_dict().items()}
    found = {places[key]: value for key, value in state.items() if places.get(key) is not None}
    tied = {k: found[place] for k, place in places.items() if k not in state and place in found}
    return {**state, **tied}


def is_dense(layer: LowRankLayer, value: Tensor) -> bool:
    """Whether `value` has the shape of the dense layer's weight (never that of a packed one)."""
    return layer._is_dense(value)


def packed_from_dense(layer: LowRankLayer, value: Tensor) -> Tensor:
    """The nearest point of the layer's manifold, at its present rank.

    Raises
    ------
    ValueError
        If `value` is not finite or its rank is too small.
    """
    if not bool(torch.isfinite(value).all()):
        raise ValueError("it holds NaN or Inf")
    return layer.manifold.from_dense(layer.matricised(value))


def defect(layer: LowRankLayer, value: Tensor) -> str | None:
    """In words, why `value` is no point of the layer's manifold at any rank; None if it is one."""
    M, lead = copy.copy(layer.manifold), tuple(layer.weight.shape[:-2])
    rank = value.shape[-1] if value.ndim >= 2 else 0
    if not 1 <= rank <= min(M.m, M.n) or tuple(value.shape) != (*lead, M.m + rank + M.n, rank):
        size = ", ".join([*map(str, lead), f"{M.m} + r + {M.n}", "r"])
        dense = math.prod(lead) * M.m
        return (
            f"its shape must be ({size}) with r in 1..{min(M.m, M.n)}, or for a dense weight "
            f"({dense}, ...) of {dense * M.n} entries, got {tuple(value.shape)}"
        )
    if not value.is_floating_point():
        return f"its dtype must be a floating point type, got {value.dtype}"
    tol = storage_tolerance(value.dtype)
    ok, reason = M.set_rank_(rank).check_point_on_manifold(value, explain=True, atol=tol, rtol=tol)
    return None if ok else reason


def not_finite(value: Tensor, parameter: bool) -> str | None:
    """In words, which values can be no state of a model; None if there are none.

    Infinite buffers are fine: attention masks have them.
    """
    if not (value.is_floating_point() or value.is_complex()) or not value.numel():
        return None
    if value.element_size() == 1:  # float8 has few operations
        value = value.float()
    if bool(torch.isfinite(value.sum())):  # the common case, without a mask of all entries
        return None
    if bool(torch.isnan(value).any()):
        return "holds NaN"
    return "holds Inf" if parameter and bool(torch.isinf(value).any()) else None
