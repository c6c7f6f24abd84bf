"""Cores and the bound on their condition number, for the claims about conditioning."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import Sample
from ..sampling import Draw


def draw_tau(draw: Draw) -> float:
    """0, values used in training, and large ones."""
    return float(draw.fixed.get("tau", draw.choose(0.0, 0.1, 1.0, draw.log_uniform(0.01, 10.0))))


def draw_core(draw: Draw, *, lowest: int = 1) -> Tensor:
    """A full core, float64 on the CPU: log-uniform spectrum, clustered, or with one outlier."""
    r = int(draw.fixed.get("r", draw.integer(lowest, 7)))
    s = draw.spectrum(r, draw.cond(), draw.log_uniform(0.1, 10.0))
    kind = draw.integer(0, 2)
    if kind == 1:
        s = s[-1] * (1.0 + 0.3 * draw.shares(r))
    elif kind == 2 and r > 2:
        s[1:-1] = s[0] if draw.uniform() < 0.5 else s[-1]
    return draw.core(s.sort(descending=True).values)


def core_sample(
    seed: int, dtype: torch.dtype, device: torch.device, *, lowest: int = 1, **fixed
) -> Sample:
    """``S`` and ``tau``."""
    draw = Draw(seed, dtype, device, **fixed)
    return {"S": draw.give(draw_core(draw, lowest=lowest)), "tau": draw_tau(draw)}


def with_spectrum(
    squared: Tensor, seed: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0
) -> Tensor:
    """A full core with given squared singular values."""
    draw = Draw(seed, dtype, device)
    return draw.give(draw.core(scale * squared.double().sqrt()))


def respectral(S: Tensor, s: Tensor) -> Tensor:
    """`S` with its singular values replaced by `s` (in the order of the SVD)."""
    U, _, Vh = torch.linalg.svd(S)
    return U @ (s[..., :, None] * Vh)
