r"""How the published clamp about the mean differs from the projection.

The clamp published with CondLR sends σ to clip(σ, σ̄(1 - d), σ̄(1 + d)), σ̄ the mean, d = τ/(2 +
τ).

**Statement.** (a) Its result is feasible: cond <= 1 + τ. (b) It is no projection onto
{cond <= 1 + τ} if r >= 3 and τ > 0: the feasible spectrum (1 + τ, 1, …, 1) is moved, by exactly
τ(1 + τ)(r - 2) / (r (2 + τ)). (c) It is not idempotent; repeated, it drifts to a fixed point of the
smaller cone {|σ_i - σ̄| <= d σ̄}. (d) It never moves S less than the projection does, and for r <=
2 or τ = 0 the two agree on the feasible set, respectively everywhere.

**Proof.** (a) The ratio of the ends of the band is (1 + d)/(1 - d) = 1 + τ. (b) σ̄ = 1 + τ/r; the
upper end σ̄(1 + d) = 2(1 + τ)(1 + τ/r)/(2 + τ) is below 1 + τ iff r > 2, the lower below 1 iff r >
2. (d) The projection is the nearest point of the set. For r = 2, |σ_i - σ̄| = (σ_1 - σ_2)/2 <= dσ̄
iff σ_1 <= (1 + τ)σ_2. ∎

The ratio is (distance moved by the projection) / (distance moved by the clamp). mathematics 5
(ours).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Sample, Source, inequality, violated
from ..sampling import eps
from .spectra import core_sample, respectral

REPEAT = 200
ROUNDING = 64.0


def moved(r: int, tau: float) -> float:
    """How far (1 + τ, 1, …, 1) is moved."""
    return tau * (1.0 + tau) * max(r - 2, 0) / (r * (2.0 + tau))


def clamped(S: Tensor, tau: float) -> Tensor:
    """The definition: singular vectors stay, values go to the band about their mean."""
    s = torch.linalg.svdvals(S)
    half = tau / (2.0 + tau) * s.mean()
    return respectral(S, s.clamp(s.mean() - half, s.mean() + half))


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return core_sample(seed, dtype, device, lowest=2, **fixed)


def check(sample: Sample, *, moved=moved, idempotent: bool = False) -> Evidence:
    S, tau = sample["S"], sample["tau"]
    r, kappa, half = S.shape[-1], 1.0 + sample["tau"], tau / (2.0 + tau)
    scale = ROUNDING * eps(S) * kappa

    def clamp(A: Tensor) -> Tensor:
        return linalg.spectral_clip(A, tau, centre="mean")

    once = clamp(S)
    again = once
    for _ in range(1 if idempotent else REPEAT):
        again = clamp(again)
    s, limit = torch.linalg.svdvals(once), torch.linalg.svdvals(again)
    values = torch.linalg.svdvals(S)
    spread = values.mean() / values[-1]
    corner = torch.ones(r, dtype=S.dtype, device=S.device)
    corner[0] = kappa
    step = (clamp(torch.diag(corner)) - torch.diag(corner)).norm()
    # The drift is geometric; REPEAT times leave nothing of it for r <= 8.
    outside = ((limit - limit.mean()).abs().max() - half * limit.mean()) / limit.mean()
    defects = {
        "(a) infeasible": float(s[0] / s[-1]) / kappa - 1.0,
        "(b) displacement of the corner": abs(float(step) - moved(r, tau)) / kappa,
        "(c) limit outside of the smaller cone": float(outside),
        # What a small value is lifted along is known to eps σ_1/σ_r.
        "library's clamp": float((once - clamped(S, tau)).norm() / S.norm() / spread),
    }
    if idempotent:
        defects["not idempotent"] = float((again - once).norm() / once.norm())
    if (found := violated(defects, scale)) is not None:
        return found
    distance, nearest = (S - once).norm(), (S - linalg.spectral_clip(S, tau)).norm()
    return inequality(nearest, distance, tolerance=scale * float(S.norm()))


def three(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """r >= 3 and τ > 0, far from feasible."""
    return sample(seed, dtype, device, r=3 + seed % 4, tau=0.5, cond=50.0)


CLAIM = Claim(
    id="conditioning/mean-clamp",
    title="The clamp about the mean is feasible, but no projection",
    statement=(
        r"\sigma=(1+\tau,1,\dots,1)\text{ is feasible and moved by }"
        r"\frac{\tau(1+\tau)(r-2)}{r(2+\tau)};\quad \|S-\Pi(S)\|\le\|S-\mathrm{clamp}(S)\|"
    ),
    hypotheses=("S nonsingular", "r >= 2"),
    source=Source("ours", "mathematics 5, on Savostianova et al. 2023 (arXiv 2306.01485)"),
    sample=sample,
    check=check,
    controls=(
        Control("claimed to be idempotent", partial(check, idempotent=True), three),
        Control(
            "claimed to leave feasible spectra alone", partial(check, moved=lambda r, tau: 0.0)
        ),
    ),
    trials=60,
    float32="64 eps κ (relative; times σ̄/σ_r for the clamp), 64 eps κ ‖S‖ for distances",
)
