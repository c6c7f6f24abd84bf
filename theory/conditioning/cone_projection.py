r"""The projection of spectra is nonexpansive; that of matrices is not.

**Statement.** Spectra of condition at most κ form a closed convex cone Q = {x >= 0 : max x <= κ min
x}; with the projection of the claim exact-projection, for any two spectra in decreasing order,

    ‖proj_Q(σ) - proj_Q(σ')‖ <= ‖σ - σ'‖.

**Proof.** The projection onto a convex set is nonexpansive; Q is permutation invariant, so
projecting keeps the order. ∎

**Sharp** for two feasible spectra, which do not move. **Not** true of matrices: {S : cond S <= κ}
is not convex, and near a singular S the nearest point jumps: diag(1, ±η) go to ½diag(1, ±1) for κ =
1. mathematics 5 (classical).
"""

from __future__ import annotations

from functools import partial

import torch

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, violated
from ..sampling import Draw, eps
from .spectra import draw_tau

CONSTANT = 1.0
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    r = int(draw.fixed.get("r", draw.integer(1, 8)))
    a = draw.spectrum(r, draw.cond())
    noise = draw.distance() * draw.normal(r)
    b = (a * (1.0 + noise)).abs().sort(descending=True).values
    if draw.uniform() < 0.3:
        b = draw.spectrum(r, draw.cond())
    return {"a": draw.give(a), "b": draw.give(b), "tau": draw_tau(draw)}


def check(sample: Sample, *, constant: float = CONSTANT) -> Evidence:
    a, b, tau = sample["a"], sample["b"], sample["tau"]
    p, q = linalg.clip_values(a, tau), linalg.clip_values(b, tau)
    tolerance = ROUNDING * eps(a) * float(a.norm() + b.norm())
    outside = {name: s.max() - (1.0 + tau) * s.min() for name, s in (("of σ", p), ("of σ'", q))}
    if (found := violated(outside, (1.0 + tau) * tolerance)) is not None:
        return found
    return inequality((p - q).norm(), constant * (a - b).norm(), tolerance=tolerance)


def feasible(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    draw = Draw(seed, dtype, device)
    a, b = draw.spectrum(4, 1.5), draw.spectrum(4, 1.9)
    return {"a": draw.give(a), "b": draw.give(b), "tau": 1.0}


def check_matrices(sample: Sample) -> Evidence:
    """The same of matrices: diag(1, ±η)."""
    eta = sample["eta"]
    a, b = torch.diag(torch.stack((1 + 0 * eta, eta))), torch.diag(torch.stack((1 + 0 * eta, -eta)))
    return inequality(
        (linalg.spectral_clip(a, 0.0) - linalg.spectral_clip(b, 0.0)).norm(), (a - b).norm()
    )


def nearly_singular(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    draw = Draw(seed, dtype, device)
    return {"eta": draw.give(torch.tensor(draw.log_uniform(1e-3, 1e-1), dtype=torch.float64))}


CLAIM = Claim(
    id="conditioning/cone-projection",
    title="Projecting spectra is nonexpansive",
    statement=r"\|\mathrm{proj}_Q(\sigma)-\mathrm{proj}_Q(\sigma')\|\le\|\sigma-\sigma'\|",
    hypotheses=("σ, σ' >= 0 in decreasing order",),
    source=Source("classical", "convexity of the cone; mathematics 5"),
    sample=sample,
    check=check,
    extremal=(Extremal(feasible),),
    controls=(
        Control("0.9 of the constant, feasible spectra", partial(check, constant=0.9), feasible),
        Control("matrices in place of spectra", check_matrices, nearly_singular),
    ),
    trials=80,
    float32="64 eps (‖σ‖ + ‖σ'‖)",
)
