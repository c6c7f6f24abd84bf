r"""Long-time stability of the regularised core, linear in β.

**Statement.** For the flow of the claim stability, Ṡ = -(S - M) - β∇R(S), let c = sqrt((r - 1)/r)
and a = 1 - 2βc > 0. Then

    ‖S(t) - M‖ <= e^{-at} ‖S(0) - M‖ + β ‖∇R(M)‖ (1 - e^{-at})/a,      ‖∇R(M)‖ <= 2‖M‖₂,

and any two solutions approach each other at least like e^{-at}. So regularising with β moves the
core by O(β), not O(√β) as estimate (5) allows, and not at all if M is a multiple of an orthogonal
matrix.

**Proof.** R + c‖·‖² is convex (claim penalty-weakly-convex), so ⟨∇R(S) - ∇R(S'), S - S'⟩ >=
-2c‖S - S'‖². With E = S - M: ½ d/dt ‖E‖² <= -‖E‖² + 2βc‖E‖² - β⟨∇R(M), E⟩. Gronwall. (Where R = 0
take the subgradient 0 of R at M.) ∎

**Sharp** as β → 0 for large t: then S(∞) = M - β∇R(M) + o(β). mathematics 5 (ours).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ..sampling import Draw, eps
from .penalty_weakly_convex import constant
from .stability import STEPS, TIME, draw_flow, integrate

FACTOR = 1.0
ROUNDING = 64.0


def final_bound(M: Tensor, beta: float) -> float:
    """The bound for t → ∞; infinite for β >= 1/(2c)."""
    a = 1.0 - 2.0 * beta * constant(M.shape[-1])
    size = float(linalg.conditioning_penalty_grad(M).norm())
    return beta * size / a if a > 0 else float("inf")


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """β from 10⁻³ to 0.9 of 1/(2c); every other target is a multiple of an orthogonal matrix."""
    draw = Draw(seed, dtype, device, **fixed)
    S, M, _ = draw_flow(draw)
    r = M.shape[-1]
    if seed % 4 == 3:
        M = torch.linalg.qr(M).Q / r**0.5
    shares = [[[draw.log_uniform(2e-3, 0.9)]] for _ in range(len(M))]
    beta = torch.tensor(shares, dtype=torch.float64) / (2.0 * constant(r))
    return {"S": draw.give(S), "M": draw.give(M), "beta": draw.give(beta)}


def check(sample: Sample, *, factor: float = FACTOR, convexity: float = 2.0) -> Evidence:
    S, M, beta = sample["S"], sample["M"], sample["beta"]
    coarse, fine = (integrate(S, M, beta, k * STEPS) for k in (1, 2))
    step_error = torch.linalg.matrix_norm(coarse - fine).amax(0)
    b = beta[:, 0, 0]
    a = 1.0 - convexity * b * constant(M.shape[-1])
    t = torch.linspace(0.0, TIME, STEPS + 1, dtype=S.dtype, device=S.device)[:, None]
    measured = torch.linalg.matrix_norm(fine - M)
    gradient = torch.linalg.matrix_norm(linalg.conditioning_penalty_grad(M))
    bound = torch.exp(-a * t) * measured[0] + factor * b * gradient * (1.0 - torch.exp(-a * t)) / a
    slack = 4.0 * step_error + ROUNDING * eps(S) * (1.0 + TIME)
    late = slice(len(t) // 10, None)
    ratio = (measured / bound.clamp_min(float(slack.max())))[late].amax(0)
    held = bool((measured <= bound + slack).all())
    held &= bool(gradient.max() <= 2.0 * torch.linalg.matrix_norm(M, 2).max() * (1 + 1e-5))
    return Evidence(
        measured=float(ratio.max()),
        bound=1.0,
        holds=held,
        independent=len(b),
        detail={"step error": float(step_error.max())},
        ratios=tuple(ratio.tolist()),
    )


def from_the_target(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Start at M, β small: the end is M - β∇R(M)."""
    given = dict(sample(4 * seed, dtype, device, r=3, cond=5.0))
    given["S"] = given["M"].clone()
    given["beta"] = torch.full_like(given["beta"], 0.01)
    return given


CLAIM = Claim(
    id="conditioning/stability-linear",
    title="Long-time stability of the regularised core, O(β)",
    statement=(
        r"\|S(t)-M\|\le e^{-at}\|S(0)-M\|+\beta\|\nabla R(M)\|\frac{1-e^{-at}}a,\quad "
        r"a=1-2\beta\sqrt{\tfrac{r-1}r}>0"
    ),
    hypotheses=("2β sqrt((r - 1)/r) < 1", "L(W) = ½‖W - A‖², fixed bases, M = UᵀAV"),
    source=Source("ours", "sharpens arXiv 2505.08022, eq. (5), for small β"),
    sample=sample,
    check=check,
    extremal=(Extremal(from_the_target),),
    controls=(
        Control("0.9 of ‖∇R(M)‖, start at M", partial(check, factor=0.9), from_the_target),
        Control(
            "a = 1: contraction as without regulariser", partial(check, factor=0.5, convexity=0.0)
        ),
    ),
    loose={"convexity": 0.37},
    trials=8,
    float32="4 × step error (RK4, halved step) + 64 eps (1 + T)",
)
