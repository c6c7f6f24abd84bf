"""The masks of attention as one tensor that is added to the scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merged_masks(
    attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, sources: int
) -> Tensor | None:
    """Both masks as one to be added to the scores (batch, heads, target, source); or None."""
    batch, heads, targets, _ = q.shape
    mask = None
    if attn_mask is not None:
        shapes = ((targets, sources), (batch * heads, targets, sources))
        if tuple(attn_mask.shape) not in shapes:
            raise ValueError(
                f"attn_mask must have shape {shapes[0]} or {shapes[1]}, got "
                f"{tuple(attn_mask.shape)}"
            )
        mask = _added("attn_mask", attn_mask, q.dtype)
        mask = mask if mask.ndim == 2 else mask.unflatten(0, (batch, heads))
    if padding is not None:
        if tuple(padding.shape) != (batch, sources):
            raise ValueError(
                f"key_padding_mask must have shape {(batch, sources)}, got {tuple(padding.shape)}"
            )
        columns = _added("key_padding_mask", padding, q.dtype)[:, None, None, :]
        mask = columns if mask is None else mask + columns
    return mask


def _added(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add: -inf where a bool is true; numbers as they are."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name} must be of bool or a floating point dtype, got {mask.dtype}")
    return mask.to(dtype)
