r"""Exactness: KSL and BUG reproduce a given path of rank r, however large the step.

**Statement.** Let A(t) have rank r on [t₀, t₁], with V(t₁)ᵀV(t₀) and U(t₁)ᵀU(t₀) invertible, and
F(t, Y) = Ȧ(t). From Y₀ = A(t₀), one step of KSL, BUG and augmented BUG gives A(t₁) exactly, and so
does Strang-KSL if V(t_½)ᵀV(t₀) and U(t₁)ᵀU(t_½) are invertible, t_½ in the middle. Parallel BUG
does **not**.

**Proof** (KSL: Lubich and Oseledets 2014; BUG: Ceruti and Lubich 2022). K(t₁) = A(t₀)V₀ + (A(t₁) -
A(t₀))V₀ = A(t₁)V₀ spans the range of A(t₁), so U₁ is exact; then S and L see A(t₁)ᵀU₁ in full.
Strang-KSL does the same with A(t_½)V₀ and A(t₁)ᵀU(t_½), and the second half of its S and K leads to
A(t₁)V₁V₁ᵀ. In BUG both bases are exact and U₁ᵀ(A(t₀) + A(t₁) - A(t₀))V₁ is the core. Parallel BUG
has a zero in the corner where A(t₁) has Ũ_1ᵀA(t₁)Ṽ_1. ∎

Samples: A(t) = U(t) S(t) V(t)ᵀ with U, S, V linear in t. Ȧ is quadratic, so that the Runge-Kutta
method inside the substeps integrates it without error, and what remains is rounding. mathematics 7
(classical).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Sample, Source, identity, largest, not_met, smallest
from ..sampling import Draw, eps
from .schemes import SCHEMES, dense, from_dense

EXACT = ("KSL", "Strang-KSL", "BUG", "augmented BUG")
NOT_EXACT = ("parallel BUG",)
ROUNDING = 30.0  # times eps, ‖A‖ and the condition of the overlaps
VISIBLE = 1e3  # times rounding: a corner that parallel BUG must be seen to miss


def sample(
    seed: int, dtype: torch.dtype, device: torch.device, *, change: float = 0.5, **fixed
) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(3, 9)
    U0, V0 = draw.frame(m, r), draw.frame(n, r)
    S0 = draw.core(draw.spectrum(r, draw.cond(1.0, 1e2), 0.5))
    U1, V1, S1 = (change * draw.normal(k, r) / k**0.5 for k in (m, n, r))
    blocks = {"U0": U0, "U1": U1, "S0": S0, "S1": S1, "V0": V0, "V1": V1}
    return {key: draw.give(value) for key, value in blocks.items()}


def path(s: Sample, t: float) -> Tensor:
    """A(t)."""
    U, S, V = (s[k + "0"] + t * s[k + "1"] for k in "USV")
    return U @ S @ V.mT


def velocity(s: Sample, t: float) -> Tensor:
    """Ȧ(t)."""
    U, S, V = (s[k + "0"] + t * s[k + "1"] for k in "USV")
    return s["U1"] @ S @ V.mT + U @ s["S1"] @ V.mT + U @ S @ s["V1"].mT


def check(
    sample: Sample, *, exact: tuple[str, ...] = EXACT, not_exact: tuple[str, ...] = NOT_EXACT
) -> Evidence:
    A0, A1 = path(sample, 0.0), path(sample, 1.0)
    r = sample["S0"].shape[-1]
    start, end = from_dense(A0, r), from_dense(A1, r)
    half = from_dense(path(sample, 0.5), r)
    pairs = [(start.U, end.U), (start.V, end.V)]
    if "Strang-KSL" in exact:
        pairs += [(start.V, half.V), (half.U, end.U)]
    least = smallest(torch.linalg.svdvals(Q.mT @ P)[-1] for Q, P in pairs)
    if least <= 10.0 * eps(A0):
        return not_met("an overlap of the bases is singular")

    def force(t: float, Y: Tensor) -> Tensor:
        return velocity(sample, t)

    size = float(A0.norm() + A1.norm())
    # An overlap near singular magnifies rounding: K = A(t₁)V₀ is then nearly rank-deficient.
    unit = eps(A0) * size / least**2
    errors = {}
    for name in (*exact, *not_exact):
        Y = SCHEMES[name](force, 0.0, 1.0, start)
        errors[name] = float((dense(Y) - A1).norm())
    # What parallel BUG leaves out, P^⊥ A(t₁) at Y₀; nothing if r = min(m, n).
    corner = A1 - start.U @ (start.U.mT @ A1)
    corner = corner - (corner @ start.V) @ start.V.mT
    visible = float(corner.norm()) > VISIBLE * unit
    missed = not visible or all(errors[name] > ROUNDING * unit for name in not_exact)
    detail = {**{name: e / unit for name, e in errors.items()}, "smallest overlap": least}
    worst = largest(errors[name] for name in exact)
    evidence = identity(worst, tolerance=ROUNDING * unit, detail=detail)
    return Evidence(worst, evidence.bound, evidence.holds and missed, detail=detail)


CLAIM = Claim(
    id="integrators/exactness",
    title="KSL and BUG are exact on rank-r paths, parallel BUG is not",
    statement=(
        r"\mathrm{rank}\,A(t)=r,\ F=\dot A:\quad "
        r"Y_1=A(t_1)\ \text{for KSL, Strang-KSL, BUG, augmented BUG}"
    ),
    hypotheses=(
        "rank A(t) = r",
        "V(t₁)ᵀV(t₀), U(t₁)ᵀU(t₀) invertible; for Strang-KSL V(t_½)ᵀV(t₀), U(t₁)ᵀU(t_½) too",
        "Y₀ = A(t₀)",
    ),
    source=Source("classical", "Lubich and Oseledets 2014; Ceruti and Lubich 2022"),
    sample=sample,
    check=check,
    controls=(
        Control("parallel BUG called exact", partial(check, exact=("parallel BUG",), not_exact=())),
        Control(
            "projected Euler called exact",
            partial(check, exact=("projected Euler + SVD",), not_exact=()),
        ),
    ),
    trials=60,
    float32="30 eps (‖A(t₀)‖ + ‖A(t₁)‖)/σ_min(overlaps)²: rounding of K, S, L and their bases",
    kind="identity",
)
