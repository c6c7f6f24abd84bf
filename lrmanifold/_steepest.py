"""The step of an attack, for attacks and for training on attacked images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def steepest(g: Tensor, norm: str, z: Tensor, box: tuple[float, float]) -> Tensor:
    """Unit step from z by which a linear function of gradient g grows most; 0 at 0.

    sign(g), or g / |g|_2 without what points out of the box, which would use up the step.
    """
    if norm == "linf":
        return g.sign()
    low, high = box
    return unit(g.where(((g < 0) | (z < high)) & ((g > 0) | (z > low)), 0.0))


def unit(g: Tensor) -> Tensor:
    """g / |g|_2 of each image; 0 at 0."""
    flat, tiny = g.flatten(1), torch.finfo(g.dtype).tiny
    # scaled first: a confident network's gradient of 1e-30 is no zero, but its square is
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(tiny)
    return functional.normalize(flat, eps=tiny).view_as(g)
