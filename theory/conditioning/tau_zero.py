r"""τ = 0: the best multiple of an orthogonal matrix.

**Statement.** S = P diag(σ) Oᵀ nonsingular, Q = POᵀ its polar factor, mean and rms those of σ. Over
all α and orthogonal Q' the distance ‖S - αQ'‖ is least for Q' = Q, α = mean(σ), and

    ‖S - mean(σ) Q‖² = r (rms² - mean²),     ‖S - rms(σ) Q‖² = 2r rms (rms - mean).

Both vanish if S is a multiple of an orthogonal matrix, as it always is for r = 1. If it is none,

    quotient of the second and the first = 2 rms/(rms + mean) ∈ (1, 2√r/(√r + 1)):

keeping ‖S‖ (the rms) costs up to nearly twice the squared error of keeping the nuclear norm.

**Proof.** ‖S - αQ'‖² = ‖S‖² - 2α⟨S, Q'⟩ + rα², ⟨S, Q'⟩ <= Σσ_i = r mean with equality for Q' = Q.
rms > mean unless all σ_i are equal. mean >= rms/√r because ‖σ‖₁ >= ‖σ‖₂, with equality only for
rank 1, which is excluded for r >= 2. ∎

The ratio is (least error) / (error of the best competitor found), or quotient / its upper end if
that is larger. mathematics 5 (ours); the upper end 2√r/(√r + 1) sharpens the 2 given there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrmanifold import linalg

from ..core import (
    Claim,
    Control,
    Evidence,
    Extremal,
    Sample,
    Source,
    inequality,
    severest,
    smallest,
    violated,
)
from ..sampling import Draw, eps
from .spectra import core_sample, respectral

ROUNDING = 64.0


def mean(s: Tensor) -> Tensor:
    return s.mean()


def largest_quotient(r: int) -> float:
    return 2.0 * math.sqrt(r) / (math.sqrt(r) + 1.0)


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    given = core_sample(seed, dtype, device, **fixed)
    draw = Draw(seed + 1, dtype, device)
    r = given["S"].shape[-1]
    turns = torch.stack([draw.log_uniform(1e-3, 3.0) * draw.normal(r, r) for _ in range(8)])
    stretch = torch.tensor([draw.log_uniform(0.7, 1.4) for _ in range(8)], dtype=torch.float64)
    return {**given, "turns": draw.give(turns), "stretch": draw.give(stretch)}


def check(
    sample: Sample,
    *,
    centre: Callable[[Tensor], Tensor] = mean,
    largest_quotient: Callable[[int], float] = largest_quotient,
) -> Evidence:
    S, r = sample["S"], sample["S"].shape[-1]
    s = torch.linalg.svdvals(S)
    average, rms = s.mean(), s.square().mean().sqrt()
    Q = linalg.polar(S)
    best, other = (S - centre(s) * Q).square().sum(), (S - rms * Q).square().sum()

    turned = Q @ torch.linalg.matrix_exp(sample["turns"] - sample["turns"].mT)
    alpha = sample["stretch"][:, None, None] * average
    competitors = [S - alpha * turned, S - alpha * Q, S - average * turned]
    least = smallest(c.square().sum((-2, -1)).min() for c in competitors)

    scale = ROUNDING * eps(S) * float(s.square().sum()) * (1.0 + float(s[0] / s[-1]) * eps(S))
    defects = {
        "error with the mean": (best - r * (rms**2 - average**2)).abs(),
        "error with the rms": (other - 2 * r * rms * (rms - average)).abs(),
        "library differs": (linalg.spectral_clip(S, 0.0) - centre(s) * Q).square().sum(),
        "quotient below 1": best - other,
    }
    if (found := violated(defects, scale)) is not None:
        return found
    # All of it is rounding where S is a multiple of an orthogonal matrix, as for r = 1.
    quotient = other if other > scale else 0.0 * other
    return severest(
        inequality(best, least, tolerance=scale),
        inequality(quotient, largest_quotient(r) * best, tolerance=scale),
    )


def rms(s: Tensor) -> Tensor:
    return s.square().mean().sqrt()


def nearly_rank_one(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """σ = (1, η, …, η): the quotient is near its upper end; no competitor is near the best one."""
    given = dict(sample(seed, dtype, device, r=4))
    s = torch.full((4,), 1e-3, dtype=dtype, device=device)
    s[0] = 1.0
    given["S"] = respectral(given["S"], s)
    given["stretch"] = 0.0 * given["stretch"] + 2.0
    quarter = torch.zeros_like(given["turns"])  # by a quarter in two planes: all vectors move far
    quarter[:, 0, 1] = quarter[:, 2, 3] = 0.5 * math.pi
    given["turns"] = quarter
    return given


CLAIM = Claim(
    id="conditioning/tau-zero",
    title="τ = 0: mean(σ) times the polar factor",
    statement=(
        r"\min_{\alpha,Q}\|S-\alpha Q\|^2=r(\mathrm{rms}^2-\mathrm{mean}^2),\quad"
        r"1<\frac{\|S-\mathrm{rms}\,Q\|^2}{\|S-\mathrm{mean}\,Q\|^2}="
        r"\frac{2\,\mathrm{rms}}{\mathrm{rms}+\mathrm{mean}}<\frac{2\sqrt r}{\sqrt r+1}"
    ),
    hypotheses=(
        "S nonsingular",
        "for the quotient: r >= 2, and S no multiple of an orthogonal matrix",
    ),
    source=Source("ours", "mathematics 5"),
    sample=sample,
    check=check,
    extremal=(Extremal(nearly_rank_one),),
    controls=(
        Control("rms in place of mean", partial(check, centre=rms)),
        Control(
            "0.9 of the largest quotient, nearly rank 1",
            partial(check, largest_quotient=lambda r: 0.9 * largest_quotient(r)),
            nearly_rank_one,
        ),
    ),
    trials=60,
    float32="64 eps ‖S‖²: errors are squared",
)
