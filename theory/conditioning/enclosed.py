r"""Rigorous enclosures of the closed-form inequalities: every point of a region, not samples of it.

**Statement.** With interval arithmetic on boxes that cover the regions,

  (i) c(κ, r) = ½ sqrt(1 + q), q = κ²(r-1)/(κ²(r-1) + 1), lies in [½, 1/√2], and (a + b)² <=
      4c² (a² + b²/q), for κ in [1, 100], r = 2, 3, 4, 8, 64, b/a in [10⁻³, 10³] (prox constants,
      L4.3); the two sides differ by (b - qa)²/q;
 (ii) for a spectrum (κ, 1) brought to cond <= k = 1 + share (κ - 1), share 0.3 and 0.6, κ in
      [1.5, 100], the derivative of f(t) = (κ - kt)² + (t - 1)² is positive at 1.05 t* and negative
      at t*/1.05, t* = (kκ + 1)/(k² + 1) the closed form (exact projection, mathematics 5);
(iii) for r = 2 and κ - 1 in [10⁻², 99]: ln κ <= (κ² - 1)/2 = R/(√2σ_2²), and the converse R <=
      α²√2 (κ² - 1)/(2κ) (penalty, mathematics 5).

**Proof.** An interval operation contains the result at every point of its box and rounds outwards,
so the upper end of left/right bounds the quotient on the whole box. ∎

One sample is one box of κ; 240 of them cover each region, so a default run is a proof, up to the
allowance: where both sides touch, intervals are a little wider than the range, and 1 + 0.02 is
accepted. Other regions (more singular values in (ii) and (iii), κ > 100) are left to sampling.
Source: mathematics 5, L4.3 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Sample, Source, largest
from ._enclosure import box, intervals, upper

CELLS, PARTS = 240, 4
SLACK = 0.02
REACH = 1.0  # factor of c
LOGARITHM = 0.5  # of κ² - 1
THRESHOLD = 1.0  # of the closed form t*


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Box number `seed` (modulo their number) of each region."""
    return {"k": seed % CELLS}


def prox(k: int, factor: float) -> float:
    """Upper end of (a + b)²/(4c²(a² + b²/q)) over κ in the k-th box, all r and x = b/a."""
    iv = intervals()
    kappa, worst = box(k, CELLS, 1.0, 100.0), 0.0
    for r in (2, 3, 4, 8, 64):
        q = 1 - 1 / (kappa**2 * (r - 1) + 1)
        c = iv.sqrt(1 + q) / 2
        if not (c.a >= 0.5 and c.b <= iv.sqrt(iv.mpf(0.5)).b):
            return 2.0
        for j in range(24):
            x = box(j, 24, 1e-3, 1e3)
            apart = (x - q) ** 2 / (q * (1 + q) * (1 + x**2 / q))
            worst = max(worst, upper((1 - apart) / iv.mpf(factor) ** 2))
    return worst


def clip(k: int, threshold: float) -> float:
    """Upper end of the quotient of the two parts of f', at 1.05 t* and at t*/1.05."""
    worst = 0.0
    for part in range(PARTS):
        kappa = box(PARTS * k + part, PARTS * CELLS, 1.5, 100.0)
        for share in (0.3, 0.6):
            bound = 1 + share * (kappa - 1)
            t = threshold * (bound * kappa + 1) / (bound**2 + 1)
            above, below = t * 1.05, t / 1.05
            # f'/2 = t - (1 + k(κ - kt)), so t against (1 + kκ)/(1 + k²).
            free = (1 + bound * kappa) / (1 + bound**2)
            worst = max(worst, upper(free / above), upper(below / free))
    return worst


def penalty(k: int, logarithm: float) -> float:
    """Upper end of both quotients for r = 2."""
    iv, worst = intervals(), 0.0
    for part in range(PARTS):
        u = box(PARTS * k + part, PARTS * CELLS, 1e-2, 99.0)
        first = iv.log(1 + u) / (2 * iv.mpf(logarithm) * u * (1 + u / 2))
        second = 2 / (1 + u + 1 / (1 + u))
        worst = max(worst, upper(first), upper(second))
    return worst


def check(
    sample: Sample,
    *,
    reach: float = REACH,
    logarithm: float = LOGARITHM,
    threshold: float = THRESHOLD,
) -> Evidence:
    k = sample["k"]
    found = {
        "prox": prox(k, reach),
        "clip": clip(k, threshold),
        "penalty": penalty(k, logarithm),
    }
    worst = largest(found.values())
    return Evidence(worst, 1.0, worst <= 1.0 + SLACK, True, 1, found)


CLAIM = Claim(
    id="conditioning/enclosed",
    title="Closed forms enclosed by interval arithmetic",
    statement=(r"a+b\le2c\sqrt{a^2+b^2/q};\quad f'(t)=0;\quad \ln\kappa\le\tfrac12(\kappa^2-1)"),
    hypotheses=("κ in [1, 100]", "r = 2, 3, 4, 8, 64 (prox), r = 2 (clip, penalty)"),
    source=Source("ours", "mathematics 5 and L4.3; mpmath.iv"),
    sample=sample,
    check=check,
    controls=(
        Control("0.9 of c", partial(check, reach=0.9)),
        Control("0.9 of the penalty's ½", partial(check, logarithm=0.45)),
    ),
    trials=CELLS,
    float32="intervals of 53 bits, whatever the dtype",
)
