r"""Norm of a low-rank weight whose frames are orthonormal up to rounding only.

**Statement.** Let W = U S Vᵀ, δ_U = ‖UᵀU - I‖₂ and δ_V = ‖VᵀV - I‖₂. Then

    ‖W‖₂ <= √(1 + δ_U) √(1 + δ_V) σ_max(S).

**Proof.** ‖U‖₂² = ‖UᵀU‖₂ <= 1 + δ_U, and norms of products. ∎

Attained by frames that are orthonormal up to a common factor. For S = α Q, Q orthogonal, σ_max(S) =
‖S‖_F/√r, without a decomposition; for another core that mean of squares is *smaller*, and no bound.
mathematics 9 (ours).
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps

CONSTANT = 1.0
ROUNDING = 50.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(full_rank=True)
    frames = [torch.linalg.qr(draw.normal(k, r)).Q for k in (m, n)]
    # drift of a long run and, now and then, of a common factor: the extremal case
    size = draw.log_uniform(1e-7, 1e-2)
    U, V = (Q * (1 + size) if seed % 3 == 0 else Q + size * draw.normal(*Q.shape) for Q in frames)
    P, R = (torch.linalg.qr(draw.normal(r, r)).Q for _ in range(2))
    top = draw.cond(1.0, 10.0)
    s = torch.linspace(1.0, top, r, dtype=torch.float64)
    S = P * s @ R
    return {"U": draw.give(U), "S": draw.give(S), "V": draw.give(V)}


def longer(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Frames too long by the same factor."""
    found = dict(sample(3 * seed, dtype, device, m=6, n=5, cond=1.0))
    return {**found, "U": 1.01 * found["U"], "V": 1.01 * found["V"]}


def spread(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A core that is far from a multiple of an orthogonal one."""
    return sample(seed, dtype, device, m=8, n=7, r=4, cond=10.0)


def check(
    sample: Sample, *, constant: float = CONSTANT, frames: bool = True, mean: bool = False
) -> Evidence:
    U, S, V = sample["U"], sample["S"], sample["V"]
    eye = torch.eye(S.shape[0], dtype=S.dtype, device=S.device)
    bound = float(S.norm()) / math.sqrt(S.shape[0]) if mean else float(torch.linalg.norm(S, 2))
    if frames:
        for Q in (U, V):
            bound *= math.sqrt(1.0 + float(torch.linalg.norm(Q.mT @ Q - eye, 2)))
    bound *= constant
    measured = torch.linalg.norm(U @ S @ V.mT, 2)
    return inequality(measured, bound, tolerance=ROUNDING * eps(S) * bound)


CLAIM = Claim(
    id="certification/frames",
    title="‖U S Vᵀ‖ <= √(1+δ_U) √(1+δ_V) σ_max(S)",
    statement=r"\|USV^\top\|_2\le\sqrt{1+\delta_U}\sqrt{1+\delta_V}\,\sigma_{\max}(S)",
    hypotheses=("δ the measured defects ‖QᵀQ - I‖₂ of the frames",),
    source=Source("ours", "mathematics 9"),
    sample=sample,
    check=check,
    extremal=(Extremal(longer),),
    controls=(
        Control("frames taken for orthonormal", partial(check, frames=False), longer),
        Control("0.99 of it", partial(check, constant=0.99), longer),
        Control("α from the mean of squares of any core", partial(check, mean=True), spread),
    ),
    trials=60,
    float32="50 eps of the bound: products and spectral norms of small matrices",
)
