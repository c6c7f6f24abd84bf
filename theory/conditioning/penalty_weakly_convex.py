r"""R is weakly convex, with a constant that does not depend on S.

**Statement.** Let c = sqrt((r - 1)/r). R + c‖·‖² is convex on R^{r x r}: for all S with R(S) > 0
and all Z

    R(Z) >= R(S) + ⟨∇R(S), Z - S⟩ - c ‖Z - S‖².

Hence for β < 1/(2c) the regularised problem min ½‖S - A‖² + βR(S) is strongly convex with constant
1 - 2βc: *one* minimiser, whatever A, and gradient flows contract to it. (Claim stability-linear.)

**Proof.** R(S) = max tr(S T Sᵀ) over symmetric traceless T with ‖T‖_F = 1, and λ_min(T) >= -c for
those (a traceless unit spectrum has no eigenvalue beyond ±sqrt((r - 1)/r)). So tr(S T Sᵀ) + c‖S‖²
is a convex quadratic form for each T, and the maximum of convex functions is convex. ∎

**Sharp** at the singular S = diag(1, …, 1, 0): raising the last singular value to h gives
R(h) = c(1 - h²), while ∇R there has no component along it. (ours)
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, largest, not_met
from ..sampling import Draw, eps
from .spectra import draw_core

FACTOR = 1.0
ROUNDING = 64.0


def constant(r: int) -> float:
    return math.sqrt((r - 1) / r)


def minimiser(A: Tensor, beta: float, *, steps: int = 4000, rate: float = 0.01) -> Tensor:
    """argmin ½‖S - A‖² + βR(S) by a gradient flow; for pictures."""
    S = A.clone()
    for _ in range(steps):
        S = S - rate * (S - A + beta * linalg.conditioning_penalty_grad(S))
    return S


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    S = draw_core(draw, lowest=2)
    r = len(S)
    # Moves that raise or lower the smallest singular value are where R bends down most.
    U, s, Vh = torch.linalg.svd(S)
    along = s[-1] * draw.uniform(-2.0, 2.0) * U[:, -1:] @ Vh[-1:]
    move = draw.choose(along, draw.distance() * S.norm() * draw.normal(r, r) / r)
    return {"S": draw.give(S), "Z": draw.give(S + move)}


def check(sample: Sample, *, factor: float = FACTOR) -> Evidence:
    S, Z = sample["S"], sample["Z"]
    R_S, R_Z = linalg.conditioning_penalty(S), linalg.conditioning_penalty(Z)
    if 1e3 * eps(S) * S.square().sum() >= R_S:
        return not_met("R(S) = 0 to roundoff: no gradient")
    D = Z - S
    defect = R_S - R_Z + (linalg.conditioning_penalty_grad(S) * D).sum()
    measured = largest((defect, 0.0))
    bound = factor * constant(len(S)) * float(D.square().sum())
    size = float(S.square().sum() + Z.square().sum())
    # The gradient's direction is lost by ‖S‖²/R, times ‖S‖₂ ‖D‖.
    lost = float(S.square().sum() / R_S) * float(torch.linalg.matrix_norm(S, 2) * D.norm())
    return inequality(measured, bound, tolerance=ROUNDING * eps(S) * (size + lost))


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """diag(1, …, 1, 0) and diag(1, …, 1, h), turned by orthogonal matrices."""
    draw = Draw(seed, dtype, device)
    r, h = draw.integer(2, 6), draw.uniform(0.1, 0.9)
    s = torch.ones(r, dtype=torch.float64)
    s[-1] = 0.0
    P, Q = draw.frame(r, r), draw.frame(r, r)
    S, Z = P @ torch.diag(s) @ Q.mT, P @ torch.diag(s + h * (s == 0)) @ Q.mT
    return {"S": draw.give(S), "Z": draw.give(Z)}


CLAIM = Claim(
    id="conditioning/penalty-weakly-convex",
    title="The regulariser is weakly convex with constant 2 sqrt((r - 1)/r)",
    statement=(r"R(Z)\ge R(S)+\langle\nabla R(S),Z-S\rangle-\sqrt{\tfrac{r-1}{r}}\,\|Z-S\|^2"),
    hypotheses=("R(S) > 0",),
    source=Source("ours", "proved here"),
    sample=sample,
    check=check,
    extremal=(Extremal(attained),),
    controls=(
        Control("0.9 of the constant, at a singular S", partial(check, factor=0.9), attained),
        Control("claimed to be convex", partial(check, factor=0.0)),
    ),
    trials=120,
    float32="64 eps (‖S‖² + ‖Z‖² + ‖S‖₂‖Z - S‖‖S‖²/R): R, and the direction of its gradient",
)
