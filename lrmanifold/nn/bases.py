"""The frozen layers under adapters: their sizes, and the dense weight of those that have one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import STORAGE_DTYPES
from ._obstacles import has_hooks, listed
from ._ties import ties
from .kinds import is_quantized
from .layer import LowRankLayer
from .linear import LowRankLinear
from .transposed import LowRankTransposedLinear, conv1d_of_transformers


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, whose weight is transposed."""
    kind = conv1d_of_transformers(sys.modules)
    return kind is not None and isinstance(module, kind)


def is_base(module: nn.Module) -> bool:
    """Whether an adapter can stand on it: it multiplies by one matrix, of whatever storage."""
    if isinstance(module, (nn.Linear, LowRankLinear)) or is_conv1d(module):
        return True
    packed = is_quantized(module) or isinstance(getattr(module, "qweight", None), Tensor)
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return packed and all(isinstance(size, int) for size in sizes)


def sizes(module: Any) -> tuple[int, int]:
    """(in_features, out_features) of a base."""
    if is_conv1d(module):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return int(module.in_features), int(module.out_features)


def plain_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight that a change can be added to; None if it is quantized, computed or low-rank."""
    weight: Any = getattr(module, "_parameters", {}).get("weight")
    plain = type(weight) is nn.Parameter and type(weight.data) is Tensor
    if not plain or isinstance(module, LowRankLayer) or "weight" in vars(module):
        return None
    dense = weight.ndim == 2 and weight.layout is torch.strided and weight.dtype in STORAGE_DTYPES
    return weight if dense else None


def why_not_added(module: nn.Module) -> str:
    """Why W + ΔW in the place of W would not give W x + b + ΔW x, in words; "" if it does."""
    if not isinstance(module, LowRankLayer) and plain_weight(module) is None:
        return "its base has no dense weight of 16 bits or more (quantized or computed)"
    if not _multiplies_only(module):
        return f"its base has a forward of its own ({type(module).__name__})"
    return "its base has hooks" if has_hooks(module) else ""


def tied(model: nn.Module) -> Callable[[nn.Module], str]:
    """For a layer of `model`: why to change its weight changes others, too, in words; or ""."""
    shared = ties(model)

    def why(module: nn.Module) -> str:
        others = shared.get((id(module), "weight"))
        return (
            f"its weight is tied to {listed(others)}, which would change with it" if others else ""
        )

    return why


def _multiplies_only(module: nn.Module) -> bool:
    own = vars(module)
    # accelerate moves tensors between devices in a forward that it puts around this one
    name = "_old_forward" if "_hf_hook" in own else "forward"
    forward = getattr(own[name], "__func__", None) if name in own else type(module).forward
    known = [nn.Linear.forward, LowRankLayer.forward]
    if is_conv1d(module):
        known.append(conv1d_of_transformers(sys.modules).forward)
    return forward in known


def matrix(module: Any) -> Tensor | None:
    """The weight as it acts, shape (out_features, in_features); None if it cannot be read."""
    if isinstance(module, LowRankLinear):
        with torch.no_grad():
            return module.manifold.to_dense(module.weight).detach()
    weight = plain_weight(module)
    if weight is None:
        return None
    return weight.detach().mT if is_conv1d(module) else weight.detach()


def laid_out(module: nn.Module, change: Tensor) -> Tensor:
    """A change of shape (out_features, in_features) in the layout of the base's dense weight."""
    is_transposed = is_conv1d(module) or isinstance(module, LowRankTransposedLinear)
    return change.mT if is_transposed else change


def place_of(module: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Device of a base, and the dtype that its adapter has by default."""
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else None
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in STORAGE_DTYPES:
        return device, weight.dtype
    return device, torch.get_default_dtype()


@torch.no_grad()
def add_to_weight(weight: Tensor, change: Tensor, sign: float = 1.0) -> None:
    """Add `sign` times `change` to `weight` in place: the sum is formed wide and rounded once."""
    wide = torch.promote_types(weight.dtype, change.dtype)
    weight.copy_(weight.to(wide) + sign * change.to(wide))
