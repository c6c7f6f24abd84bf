"""A random search from given images that uses no gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _autoattack
from ._common import Model, project
from ._common import checked_logits as logits_of
from ._loss import margin


def climb(
    f: Model,
    start: Tensor,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    box: tuple[float, float],
    queries: int,
    generator: torch.Generator,
) -> Tensor:
    """Changes of random squares, from `start` on, each kept where it raises the margin.

    In linf a square is set to x +- eps in each channel; in l2 a step of random length between
    eps / 16 and eps along it is projected on the ball. Sides shrink from half an image to one
    pixel, and a quarter of the evaluations is left for pixels. `start` is inside ball and box.
    """
    fold, unfold = _autoattack.grid(x)
    base, z = fold(x), fold(start).clone()
    channels, height, width = base.shape[1:]
    half = min(height, width) / 2
    with torch.no_grad():
        best = margin(logits_of(f, start, y), y)
        for query in range(queries):
            open_ = (best <= 0).nonzero()[:, 0]
            if not len(open_):
                break
            side = max(1, round(half * (2 * half) ** (-query / (0.75 * queries))))
            top, left = (
                int(torch.randint(0, size - side + 1, (1,), generator=generator))
                for size in (height, width)
            )
            place = (..., slice(top, top + side), slice(left, left + side))
            draw = torch.rand(channels + 1, 1, 1, dtype=torch.float32, generator=generator).to(z)
            signs = torch.where(draw[1:] < 0.5, -1.0, 1.0).to(z)
            origin = base[open_]
            change = z[open_] - origin
            if norm == "linf":
                change[place] = eps * signs
            else:
                length = eps * 16 ** -float(draw[0])
                change[place] += length * signs / (math.sqrt(channels) * side)
                change = project(change, eps, norm)
            new = (origin + change).clamp(*box)
            found = margin(logits_of(f, unfold(new), y[open_]), y[open_])
            better = found > best[open_]
            z[open_[better]], best[open_[better]] = new[better], found[better]
    return unfold(z)
