r"""L3.3, second form: how fast tangent spaces turn, in the spectral norm.

**Statement.** For X, Y of rank r, ‖P_X - P_Y‖ <= √2 ‖X - Y‖₂ / max(σ_r(X), σ_r(Y)).

**Proof.** By L3.2 ‖P_X - P_Y‖² = s_u² + s_v² - s_u² s_v² <= s_u² + s_v², and L3.1. ∎

It is better than the Frobenius form where X - Y has many equal singular values.

**Sharp** in the limit of small angles: X = σ u uᵀ, Y = σ e₁e₁ᵀ of rank 1, u at angle θ to e₁, has
‖X - Y‖₂ = σ sin θ and ‖P_X - P_Y‖ = sin θ sqrt(2 - sin²θ). mathematics 3 (ours).
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, largest
from ..sampling import Draw, eps
from ._pairs import circle, pair, projector_distance, smallest

CONSTANT = math.sqrt(2.0)
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return pair(seed, dtype, device, **fixed)


def check(sample: Sample, *, constant: float = CONSTANT) -> Evidence:
    X, Y, D = sample["X"], sample["Y"], sample["D"]
    bound = constant * torch.linalg.matrix_norm(D, 2) / largest((smallest(X), smallest(Y)))
    tolerance = ROUNDING * eps(D) * float(1 + bound)
    return inequality(projector_distance(X, Y), bound, tolerance=tolerance)


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    draw = Draw(seed, dtype, device)
    return circle(draw.uniform(0.05, 0.2), draw.log_uniform(0.1, 10.0), dtype, device)


CLAIM = Claim(
    id="geometry/curvature-spectral",
    title="Tangent spaces turn by at most √2 ‖X - Y‖₂/σ_r",
    statement=r"\|P_X-P_Y\|_{op}\le\frac{\sqrt2\,\|X-Y\|_2}{\max(\sigma_r(X),\sigma_r(Y))}",
    hypotheses=("rank X = rank Y = r",),
    source=Source("ours", "mathematics L3.3"),
    sample=sample,
    check=check,
    extremal=(Extremal(attained),),
    controls=(
        Control("0.9 of √2, nearly attained", partial(check, constant=0.9 * CONSTANT), attained),
        Control("no √2", partial(check, constant=1.0), attained),
    ),
    trials=200,
    float32="64 eps (1 + bound): frames are orthonormal to eps, X - Y is rounded once",
)
