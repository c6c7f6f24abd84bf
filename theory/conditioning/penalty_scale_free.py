r"""A small regulariser bounds the condition number, II: given the scale α.

**Statement.** Let ρ = R(S)/α², α² = ‖S‖²/r, and ρ² < r/(r - 1). Then

    (κ² - 1)/(κ² + 1) <= θ,   θ = ρ / sqrt(2 - ρ² (r - 2)/r),   so   κ(S) <= sqrt((1 + θ)/(1 - θ)),

hence κ(S) <= κ is guaranteed by R <= √2 α² θ / sqrt(1 + θ²(r - 2)/r) with θ = (κ² - 1)/(κ² + 1).

**Proof.** x_i = σ_i²/α² have mean 1 and Σ(x_i - 1)² = ρ². Write x_1 = 1 + a, x_r = 1 - b; by
Cauchy-Schwarz the others add at least (a - b)²/(r - 2): a² + b² + (a - b)²/(r - 2) <= ρ², an
ellipse with axes along p = a + b, q = a - b: p²/2 + q² r/(2(r - 2)) <= ρ². x_1/x_r = K means that
(a, b) is on the line a + Kb = K - 1; it meets the ellipse iff its support function is at least K -
1:

    (ρ²/2) [(1 + K)² + (K - 1)² (r - 2)/r] >= (K - 1)²,

and K = κ². Equality for equal middle values, which then do lie between the ends: **attained** for
every r >= 2 and every ρ allowed. ∎

The bound of mathematics 5, sqrt((1 + ρc)/(1 - ρc)) with c = sqrt((r - 1)/r) (Samuelson's inequality
on both ends at once), has the same range of ρ, is the same for r = 2, and is weaker for r > 2: for
small ρ by the factor √2 c in κ - 1. It is checked as the second link of the chain. (ours)
"""

from __future__ import annotations

import math
from functools import partial

import torch

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, not_met
from ..sampling import Draw, eps
from .spectra import core_sample, with_spectrum

TWO = 2.0
ROUNDING = 64.0


def sharp(rho: float, r: int, two: float = TWO) -> float:
    """θ: what (κ² - 1)/(κ² + 1) may be."""
    return rho / math.sqrt(two - rho**2 * (r - 2) / r)


def samuelson(rho: float, r: int) -> float:
    """The weaker one, ρc."""
    return rho * math.sqrt((r - 1) / r)


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    moderate = {**fixed, "cond": fixed.get("cond", draw.log_uniform(1.05, 10.0))}
    return core_sample(seed, dtype, device, lowest=2, **moderate)


def check(sample: Sample, *, half: float = 1.0 / TWO) -> Evidence:
    S, r = sample["S"], sample["S"].shape[-1]
    s = torch.linalg.svdvals(S)
    rho = float(linalg.conditioning_penalty(S) / s.square().mean())
    if rho**2 >= r / (r - 1) * (1 - ROUNDING * eps(S)):
        return not_met("ρ² >= r/(r - 1): S may be singular")
    kappa = float(s[0] / s[-1])
    measured = (kappa**2 - 1) / (kappa**2 + 1)
    theta, weaker = sharp(rho, r, 1.0 / half), samuelson(rho, r)
    rounding = ROUNDING * eps(S) * (1.0 + theta**3)
    if half == 1.0 / TWO and not theta <= weaker + rounding:
        return inequality(theta, weaker)
    detail = {"r": r, "rho": rho, "kappa": kappa, "Samuelson": measured / weaker if weaker else 0.0}
    return inequality(measured, theta, tolerance=rounding, detail=detail)


def extremal(r: int, K: float) -> torch.Tensor:
    """σ² with κ² = K and equality: a ∝ 1 + K - (r - 2)(K - 1)/r, b ∝ 1 + K + (r - 2)(K - 1)/r."""
    tilt = (r - 2) * (K - 1) / r
    a, b = 1 + K - tilt, 1 + K + tilt
    size = (K - 1) / (a + K * b)  # on the line a + Kb = K - 1
    squared = torch.full((r,), 1.0 + size * (b - a) / max(r - 2, 1), dtype=torch.float64)
    squared[0], squared[-1] = 1.0 + size * a, 1.0 - size * b
    return squared


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    draw = Draw(seed, dtype, device)
    squared = extremal(draw.integer(2, 7), draw.uniform(1.2, 9.0))
    return {"S": with_spectrum(squared, seed, dtype, device, draw.log_uniform(0.1, 10.0))}


def figure(dtype: torch.dtype, device: torch.device):
    """κ against ρ for r = 8, with the bounds."""
    from ..plotting import COLOURS, new

    r = 8
    fig, ax = new()
    details = [check(s).detail for s in (sample(k, dtype, device, r=r) for k in range(250))]
    details = [d for d in details if d.get("r") == r]
    ax.scatter(
        [d["rho"] for d in details], [d["kappa"] for d in details], s=16, color=COLOURS[1],
        alpha=0.7, label="random cores, r = 8",
    )  # fmt: skip
    rho = torch.linspace(0.01, math.sqrt(r / (r - 1)) - 0.003, 300).tolist()
    for name, bound, colour, style in (
        ("sharp (here)", sharp, COLOURS[0], "-"),
        ("Samuelson (mathematics 5)", samuelson, COLOURS[2], "--"),
    ):
        theta = [bound(x, r) for x in rho]
        ax.plot(rho, [math.sqrt((1 + t) / (1 - t)) for t in theta], style, color=colour, label=name)
    spectra = (extremal(r, K) for K in (1.5, 2.5, 5.0, 10.0, 30.0, 100.0))
    sharp_points = [check({"S": with_spectrum(q, 0, dtype, device)}).detail for q in spectra]
    ax.scatter(
        [d["rho"] for d in sharp_points], [d["kappa"] for d in sharp_points], marker="D", s=22,
        color=COLOURS[3], label="extremal spectra", zorder=4,
    )  # fmt: skip
    ax.set(yscale="log", xlabel="ρ = R(S)/α²", ylabel="κ(S)", ylim=(0.95, 20), xlim=(0, 1.08))
    ax.set_yticks([1, 2, 3, 5, 10, 20], ["1", "2", "3", "5", "10", "20"])
    ax.set(title="What the penalty guarantees, whatever the scale")
    ax.legend(loc="upper left")
    return fig


CLAIM = Claim(
    id="conditioning/penalty-scale-free",
    title="κ from R/α² alone: the sharp bound",
    statement=(
        r"\frac{\kappa^2-1}{\kappa^2+1}\le\frac{\rho}{\sqrt{2-\rho^2(r-2)/r}}\le"
        r"\rho\sqrt{\tfrac{r-1}{r}},\quad\rho=R/\alpha^2"
    ),
    hypotheses=("ρ² < r/(r - 1)", "r >= 2"),
    source=Source("ours", "sharpens mathematics 5"),
    sample=sample,
    check=check,
    extremal=(Extremal(attained),),
    controls=(
        Control(
            "2 replaced by 2/0.81 (0.9 of the bound)", partial(check, half=0.81 / TWO), attained
        ),
        Control("2 replaced by 3", partial(check, half=1.0 / 3.0), attained),
    ),
    trials=120,
    figure=figure,
    float32="64 eps (1 + θ³): ρ and κ to eps, the root of a difference",
)
