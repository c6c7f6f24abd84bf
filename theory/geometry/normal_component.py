r"""C3.5: how far a point of M_r is from the tangent space at another.

**Statement.** For X of rank at most r and Y of rank r, near or far,

    ‖(I - P_Y)(X - Y)‖_F <= ‖X - Y‖_F² / (2 σ_r(Y)).

**Proof.** L3.4 with N = (I - P_Y)(X - Y), and ‖N‖₂ <= ‖N‖_F. ∎

**Sharp.** On the circle of L3.4 both sides are σ sin²θ. Koch and Lubich's lemma 4.2 (from memory)
has 4‖X - Y‖²/ρ for near pairs, beside it in the details. mathematics 3 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps
from ._pairs import circle, pair, smallest, tangent

CONSTANT = 0.5
KOCH_LUBICH, NEAR = 4.0, 1.0 / 8.0
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return pair(seed, dtype, device, both_sides=True, lower=True, **fixed)


def check(sample: Sample, *, constant: float = CONSTANT) -> Evidence:
    Y, D = sample["Y"], sample["D"]
    measured = (D - tangent(Y, D)).norm()
    squared = D.square().sum() / smallest(Y)
    detail = {"distance / σ_r": float(D.norm() / smallest(Y))}
    if D.norm() <= NEAR * smallest(Y):
        detail["Koch-Lubich"] = float(measured / squared) / KOCH_LUBICH
    tolerance = ROUNDING * eps(D) * float(D.norm() + squared)
    return inequality(measured, constant * squared, tolerance=tolerance, detail=detail)


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    draw = Draw(seed, dtype, device)
    return circle(draw.uniform(0.1, 1.5), draw.log_uniform(0.1, 10.0), dtype, device)


def ill_conditioned_here(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Y nearly of lower rank, X not: a bound with σ_r(X) and ½ must fail for some."""
    draw = Draw(seed, dtype, device)
    s = draw.give(torch.tensor([[0.05]], dtype=torch.float64))
    pair_ = circle(1.5, 1.0, dtype, device)
    Y = pair_["Y"]._replace(S=s)
    return {"X": pair_["X"], "Y": Y, "D": pair_["D"] + pair_["Y"].U @ (1 - s) @ pair_["Y"].V.mT}


def check_other_point(sample: Sample) -> Evidence:
    """σ_r(X), the other point, with the constant ½."""
    Y, D = sample["Y"], sample["D"]
    bound = CONSTANT * D.square().sum() / smallest(sample["X"])
    return inequality((D - tangent(Y, D)).norm(), bound, tolerance=ROUNDING * eps(D))


CLAIM = Claim(
    id="geometry/normal-component",
    title="Distance of a point from the tangent space at another",
    statement=r"\|(I-P_Y)(X-Y)\|_F\le\frac{\|X-Y\|_F^2}{2\sigma_r(Y)}",
    hypotheses=("rank X <= r", "rank Y = r"),
    source=Source("ours", "mathematics C3.5"),
    sample=sample,
    check=check,
    extremal=(Extremal(attained),),
    controls=(
        Control("0.9 of ½, on the circle", partial(check, constant=0.9 * CONSTANT), attained),
        Control("σ_r at the other point", check_other_point, ill_conditioned_here),
    ),
    trials=240,
    float32="64 eps (‖X - Y‖ + ‖X - Y‖²/σ_r): P_Y is a projector to eps",
)
