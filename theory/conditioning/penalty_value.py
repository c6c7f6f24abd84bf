r"""The regulariser R(S) = ‖SᵀS - α²I‖_F, α² = ‖S‖²/r: what it measures, and its gradient.

**Statement.** With the singular values σ of S,

    R(S) = √r × (standard deviation of the σ_i²),
    ∇R(S) = 2 S (SᵀS - α²I) / R   where R > 0,
    ⟨∇R(S), S⟩ = 2R (R is homogeneous of degree 2),   ‖∇R(S)‖_F <= 2 ‖S‖₂.

**Proof.** SᵀS - α²I has the eigenvalues σ_i² - mean(σ²). In R² = ‖SᵀS‖² - rα⁴ the derivative of α
drops out, for SᵀS - α²I is traceless. The last line: (SᵀS - α²I)/R has unit Frobenius norm. ∎

**Checked** against automatic differentiation of the definition and against the library's
``conditioning_penalty`` and ``conditioning_penalty_grad``. Schotthöfer, Yang, Schnake (arXiv
2505.08022); mathematics 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Sample, Source, identity, not_met, worst_of
from ..sampling import eps
from .spectra import core_sample

FACTOR = 2.0
ROUNDING = 64.0


def deviation(s: Tensor) -> Tensor:
    """√r std(σ²), the standard deviation of a population."""
    return len(s) ** 0.5 * s.square().std(correction=0)


def penalty(S: Tensor) -> Tensor:
    """The definition."""
    r = S.shape[-1]
    eye = torch.eye(r, dtype=S.dtype, device=S.device)
    return torch.linalg.matrix_norm(S.mT @ S - S.square().sum() / r * eye)


def gradient(S: Tensor, factor: float = FACTOR) -> Tensor:
    r = S.shape[-1]
    eye = torch.eye(r, dtype=S.dtype, device=S.device)
    return factor * S @ (S.mT @ S - S.square().sum() / r * eye) / penalty(S)


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return core_sample(seed, dtype, device, lowest=2, **fixed)


def check(
    sample: Sample,
    *,
    deviation: Callable[[Tensor], Tensor] = deviation,
    gradient: Callable[[Tensor], Tensor] = gradient,
) -> Evidence:
    S = sample["S"]
    s = torch.linalg.svdvals(S)
    R, size = penalty(S), S.square().sum()
    if 1e3 * eps(S) * size >= R:
        return not_met("R(S) = 0 to roundoff: no gradient")
    leaf = S.clone().requires_grad_()
    (autograd,) = torch.autograd.grad(penalty(leaf), leaf)
    claimed = gradient(S)
    deviations = {
        "R": (R - deviation(s)).abs() / size,
        "R, library": (R - linalg.conditioning_penalty(S)).abs() / size,
        "∇R": (claimed - autograd).norm() / s[0],
        "∇R, library": (claimed - linalg.conditioning_penalty_grad(S)).norm() / s[0],
        "⟨∇R, S⟩ - 2R": ((claimed * S).sum() - 2 * R).abs() / size,
        "‖∇R‖ - 2‖S‖₂": (claimed.norm() - 2 * s[0]) / s[0],
    }
    worst, size_of_worst = worst_of(deviations)
    # The direction (SᵀS - α²I)/R loses ‖S‖²/R of its digits.
    condition = float(size / R)
    return identity(
        size_of_worst,
        tolerance=ROUNDING * eps(S) * condition,
        detail={"worst": worst},
    )


def sample_deviation(s: Tensor) -> Tensor:
    return len(s) ** 0.5 * s.square().std(correction=1)


def of_the_values(s: Tensor) -> Tensor:
    return len(s) ** 0.5 * s.std(correction=0)


CLAIM = Claim(
    id="conditioning/penalty-value",
    title="R(S) is √r × the standard deviation of σ²; its gradient",
    statement=(
        r"R(S)=\|S^\top S-\alpha^2I\|_F=\sqrt r\,\mathrm{std}(\sigma^2),\ "
        r"\nabla R=\frac{2S(S^\top S-\alpha^2I)}{R},\ "
        r"\langle\nabla R,S\rangle=2R,\ \|\nabla R\|\le2\|S\|_2"
    ),
    hypotheses=("R(S) > 0 for the gradient",),
    source=Source("published", "arXiv 2505.08022; mathematics 5"),
    sample=sample,
    check=check,
    controls=(
        Control("standard deviation with r - 1", partial(check, deviation=sample_deviation)),
        Control("standard deviation of σ, not σ²", partial(check, deviation=of_the_values)),
        Control("gradient without the 2", partial(check, gradient=partial(gradient, factor=1.0))),
    ),
    trials=60,
    float32="64 eps ‖S‖²/R: the direction SᵀS - α²I is a difference",
    kind="identity",
)
