r"""A small regulariser bounds the condition number, I: given σ_r.

**Statement.** For S nonsingular,

    ln κ(S) <= R(S) / (√2 σ_r²),

and, sharper, κ(S)² <= 1 + √2 R(S)/σ_r².

**Proof.** Nagy's inequality: among numbers with a given sum of squared deviations R² the range is
at most √2 R, so σ_1² - σ_r² <= √2 R; divide by σ_r². Then ln(1 + x) <= x. ∎

**Sharp.** The second line is attained by every spectrum whose other σ_i² lie midway between the
ends; the first by the same in the limit κ → 1. The ratio is that of the logarithms; the details
have the ratio κ / exp(…) too. First line: Schotthöfer, Yang, Schnake (arXiv 2505.08022).
mathematics 5.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, smallest
from ..sampling import Draw, eps
from .spectra import core_sample, with_spectrum

CONSTANT = 1.0 / math.sqrt(2.0)
SHARP = math.sqrt(2.0)
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return core_sample(seed, dtype, device, **fixed)


def check(sample: Sample, *, constant: float = CONSTANT, sharp: float = SHARP) -> Evidence:
    S = sample["S"]
    s = torch.linalg.svdvals(S)
    kappa = float(s[0] / s[-1])
    R = float(linalg.conditioning_penalty(S)) / float(s[-1]) ** 2
    rounding = ROUNDING * eps(S) * kappa**2  # of R/σ_r²
    detail = {
        "κ/exp": kappa * math.exp(-smallest((constant * R, 700.0))),
        "sharp": kappa**2 / (1 + sharp * R),
    }
    if not kappa**2 <= 1.0 + sharp * R + rounding:
        return inequality(kappa**2, 1.0 + sharp * R, detail=detail)
    return inequality(math.log(kappa), constant * R, tolerance=rounding, detail=detail)


def midway(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """σ² = (1 + δ, 1, …, 1, 1 - δ)."""
    draw = Draw(seed, dtype, device)
    squared = torch.ones(draw.integer(2, 6), dtype=torch.float64)
    delta = draw.uniform(0.002, 0.01)
    squared[0], squared[-1] = 1.0 + delta, 1.0 - delta
    scale = draw.log_uniform(0.1, 10.0)
    return {"S": with_spectrum(squared, seed, dtype, device, scale)}


CLAIM = Claim(
    id="conditioning/penalty-exponential",
    title="κ <= exp(R/(√2 σ_r²)), and κ² <= 1 + √2 R/σ_r²",
    statement=(r"\kappa(S)\le\sqrt{1+\sqrt2\,R/\sigma_r^2}\le\exp\frac{R}{\sqrt2\,\sigma_r^2}"),
    hypotheses=("S nonsingular",),
    source=Source("published", "arXiv 2505.08022; the sharper form ours, mathematics 5"),
    sample=sample,
    check=check,
    extremal=(Extremal(midway),),
    controls=(
        Control("0.9 of 1/√2, small spread", partial(check, constant=0.9 * CONSTANT), midway),
        Control("0.9 of √2 in the sharper form", partial(check, sharp=0.9 * SHARP), midway),
    ),
    trials=100,
    float32="64 eps κ²: R/σ_r² is known to eps ‖S‖²/σ_r²",
)
