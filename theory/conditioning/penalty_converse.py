r"""The converse: a well-conditioned core has a small regulariser.

**Statement.** κ(S) <= κ implies R(S) <= α² √r (κ² - 1)/(2κ), α² = ‖S‖²/r.

**Proof.** The σ_i² lie in [μ, κ²μ] and have mean α². Bhatia and Davis: their variance is at most
(κ²μ - α²)(α² - μ); divided by α⁴ this is largest for μ = α²(1 + κ²)/(2κ²), with the value
((κ² - 1)/(2κ))². And R = √r std(σ²). ∎

**Sharp** for spectra of two values with a share 1/(κ² + 1) of large ones: κ² = r/k - 1, k of them
large. So with the claim penalty-scale-free the regulariser and the condition number control each
other with constants that depend on r alone. mathematics 5 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps
from .spectra import core_sample, with_spectrum

CONSTANT = 0.5
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return core_sample(seed, dtype, device, **fixed)


def check(sample: Sample, *, constant: float = CONSTANT) -> Evidence:
    S, r = sample["S"], sample["S"].shape[-1]
    s = torch.linalg.svdvals(S)
    kappa = float(s[0] / s[-1])
    rho = float(linalg.conditioning_penalty(S) / s.square().mean())
    bound = constant * r**0.5 * (kappa**2 - 1.0) / kappa
    return inequality(rho, bound, tolerance=ROUNDING * eps(S) * (r + kappa))


def two_values(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """k values κ², r - k values 1, κ² = r/k - 1."""
    draw = Draw(seed, dtype, device)
    k = draw.integer(1, 2)
    r = draw.integer(2 * k + 1, 8)
    squared = torch.ones(r, dtype=torch.float64)
    squared[:k] = r / k - 1.0
    return {"S": with_spectrum(squared, seed, dtype, device, draw.log_uniform(0.1, 10.0))}


CLAIM = Claim(
    id="conditioning/penalty-converse",
    title="A well-conditioned core has a small regulariser",
    statement=(
        r"\kappa(S)\le\kappa\ \Rightarrow\ R(S)\le\alpha^2\sqrt r\,\frac{\kappa^2-1}{2\kappa}"
    ),
    hypotheses=("S nonsingular",),
    source=Source("ours", "Bhatia and Davis 2000; mathematics 5"),
    sample=sample,
    check=check,
    extremal=(Extremal(two_values),),
    controls=(
        Control("0.9 of ½, two values", partial(check, constant=0.9 * CONSTANT), two_values),
    ),
    trials=100,
    float32="64 eps (r + κ): ρ and κ to eps",
)
