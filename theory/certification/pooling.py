r"""Maximum pooling stretches by the root of the overlap.

**Statement.** Windows of k at stride s, in each of d dimensions: maximum pooling has Lipschitz
constant at most √(⌈k/s⌉^d), which is 1 without overlap.

**Proof.** An output changes by at most the largest change in its window, so the sum of squares is
at most Σ over windows of Σ over their pixels, in which each pixel occurs at most ⌈k/s⌉^d times. ∎

Attained by one pixel far above all others. mathematics 9 (classical).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn import functional as F

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps

CONSTANT = 1.0
ROUNDING = 20.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    k = draw.integer(1, 4)
    stride, side = draw.integer(1, k), draw.integer(k, 9)
    x = draw.normal(1, 1, side, side)
    step = torch.zeros_like(x)
    if draw.choose(True, False):
        step[0, 0, draw.integer(0, side - 1), draw.integer(0, side - 1)] = draw.uniform(1.0, 20.0)
    else:
        step = draw.normal(1, 1, side, side)
    return {"x": draw.give(x), "step": draw.give(step), "k": k, "stride": stride}


def one_pixel(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A pixel in the middle rises above all others."""
    k = 2 + seed % 2
    x = torch.zeros(1, 1, 4 * k, 4 * k, dtype=dtype, device=device)
    step = torch.zeros_like(x)
    step[0, 0, 2 * k, 2 * k] = 1.0
    return {"x": x, "step": step, "k": k, "stride": 1}


def check(sample: Sample, *, constant: float = CONSTANT, overlap: bool = True) -> Evidence:
    k, s, x = sample["k"], sample["stride"], sample["x"]
    change = F.max_pool2d(x + sample["step"], k, s) - F.max_pool2d(x, k, s)
    many = math.ceil(k / s) ** 2 if overlap else 1
    bound = constant * math.sqrt(many) * float(sample["step"].norm())
    return inequality(change.norm(), bound, tolerance=ROUNDING * eps(x) * (1.0 + bound))


CLAIM = Claim(
    id="certification/pooling",
    title="Maximum pooling: L <= √(⌈k/s⌉^d)",
    statement=r"\|P(x)-P(y)\|\le\sqrt{\lceil k/s\rceil^d}\,\|x-y\|",
    hypotheses=("windows of k^d at stride s, no dilation",),
    source=Source("classical", "mathematics 9"),
    sample=sample,
    check=check,
    extremal=(Extremal(one_pixel),),
    controls=(
        Control("overlap forgotten", partial(check, overlap=False), one_pixel),
        Control("0.99 of it", partial(check, constant=0.99), one_pixel),
    ),
    trials=80,
    float32="20 eps of the change: only the sums x + step are rounded",
)
