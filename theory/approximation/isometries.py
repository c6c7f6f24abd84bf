r"""Theorem A on K_0, the multiples of partial isometries: O(ε) with the constraint always active.

**Statement.** K_0 = {αUVᵀ} is a smooth manifold, and L4.3 is its curvature. With X = Π_{K_0}W, ε =
‖W - X‖, c = ½ sqrt((2r-1)/r) and q = 2cε/σ_r(X) < 1, the constrained flow fulfils e = ‖Y - X‖ <=
E,

    E' = (λ + κ_0) E + ℓε + δ_0,   κ_0 = c (‖N_Y‖/σ_r(Y) + ‖N_X‖/σ_r(X)),
    δ_0 = q/(1 - q) ‖P_{T_X K_0} F(W)‖.

With constants: ‖Y - X‖ <= ε b (e^{at} - 1)/a, a = λ + 2cμ/s, b = ℓ + 2cμ/(s - 2cε).

**Proof.** L4.3 at a smooth point bounds the second fundamental form in the direction N by
2c‖N‖/σ_r, from above for N and from below for -N, so ‖S_N‖ <= 2c‖N‖/σ_r. Hence for q < 1 X is C¹
and Ẋ = (I - S_{W-X})⁻¹ P_{T_X}F(W) differs from P_{T_X}F(W) by at most δ_0; the rest is theorem
A's proof. ∎

This is the limit in which the training is most robust (τ = 0, condition number 1). c is sharp.
Ours; not in the mathematics yet.
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from . import _constrained_paths as paths
from ._evidence import along_paths, below
from .constrained_flow import integrate, reach_constant
from .extremal import sharp_reach
from .flows import GRID, Measured, refine

REACH = 1.0  # factor of c in κ_0
DEFECT = 1.0  # of δ_0
STEP_TOLERANCE = 1e-2


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return paths.sample(seed, dtype, device, **{"tau": 0.0, "spread": 1.1, "change": 0.3, **fixed})


def check(sample: Sample, *, reach: float = REACH, defect: float = DEFECT) -> Evidence:
    at = sample["problem"]
    c = reach_constant(at.rank, 0.0)

    def run(steps: int) -> Measured:
        q = dict(paths.measure(at, 0.0, integrate(at, 0.0, steps)))
        bend = (2.0 * c * q["eps"] / q["s_X"]).clamp_max(1.0 - 1e-9)
        q["defect"] = defect * bend / (1.0 - bend) * q["speed_X"]
        q["E"] = paths.theorem_C(q, reach * c, 1.0)
        q["q"] = bend
        return q

    q, moved = refine(run, ("e", "E"), tolerance=STEP_TOLERANCE, first=2 * GRID, most=8 * GRID)
    met = below(q["q"], 1.0 - 1e-6).all(0) & below(moved[GRID // 10 :], STEP_TOLERANCE).all(0)
    detail = {"problem": at.name, "ε, largest": float(q["eps"].max())}
    reason = "2cε >= σ_r(X), or not resolved"
    return along_paths(q["e"], q["E"], met, moved=moved, reason=reason, detail=detail)


def far(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A prescribed path that stays away from K_0, where Π turns faster than its argument."""
    return sample(seed, dtype, device, families=("prescribed path",), spread=1.3, change=0.2)


CLAIM = Claim(
    id="approximation/isometries",
    title="Theorem A on K_0 (τ = 0): O(ε) under an active constraint",
    statement=(
        r"E'=(\lambda+\kappa_0)E+\ell\varepsilon+\tfrac{q}{1-q}\|P_{T_X}F(W)\|,\quad "
        r"q=\frac{2c\varepsilon}{\sigma_r(X)},\quad c=\tfrac12\sqrt{\tfrac{2r-1}{r}}"
    ),
    hypotheses=("Ẏ = P_{T K_0} F(Y)", "X = Π_{K_0} W, 2c‖W - X‖ < σ_r(X)"),
    source=Source("ours", "theory/approximation/isometries.py"),
    sample=sample,
    check=check,
    extremal=(Extremal(partial(sharp_reach, tau=0.0)),),
    controls=(
        Control(
            "0.9 of c, where it is attained",
            partial(check, reach=0.9 * REACH),
            partial(sharp_reach, tau=0.0),
        ),
        Control("no defect of X", partial(check, defect=0.0), far),
    ),
    loose={"defect": 0.5},
    trials=8,
    float32="float64 only: P_{T_K} is a difference quotient with step 10⁻⁶",
)
