"""Where a layer is, and which directions its gradient would add to its bases."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import linalg
from ..factors import Factors, unpack
from ..nn.layer import LowRankLayer


def point_of(layer: LowRankLayer) -> Factors:
    """Copies of a layer's factors, in a compute dtype."""
    M, wide = layer.manifold, linalg.compute_dtype(layer.weight.dtype)
    return unpack(layer.weight.detach().to(wide).clone(), M.m, M.n)


def directions_of(layer: LowRankLayer) -> tuple[Tensor, Tensor] | None:
    """Blocks U_p and V_p of the Riemannian gradient: what is new in GV and GᵀU."""
    grad = layer.weight.grad
    if grad is None or not bool(torch.isfinite(grad).all()):
        return None
    wide = linalg.compute_dtype(grad.dtype)
    xi = layer.manifold.egrad2rgrad(layer.weight.detach().to(wide), grad.to(wide))
    blocks = layer.manifold.unpack(xi)
    return blocks.U.clone(), blocks.V.clone()
