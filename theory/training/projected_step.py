r"""T2 in one step: what the projection onto cond <= κ does to distances.

**Statement.** Let Z have rank r, Ŷ = Π_K(Z), K = K_τ, and X ∈ K any other point. Then

    ‖Ŷ - X‖² <= (‖Z - X‖² - ‖Z - Ŷ‖²) σ_r(Ŷ)/σ_r(Z).

For several layers: ‖·‖ of the product metric, and the largest quotient σ_r(Ŷ_i)/σ_r(Z_i).

**Proof.** N = Z - Ŷ is a proximal normal at Ŷ (L4.2), inside the row and column spaces of Ŷ, and
its inward part on the smallest singular values is what clipping adds to them: at most σ_r(Ŷ) -
σ_r(Z). By L4.3 (first form) ⟨X - Ŷ, N⟩ <= q ‖X - Ŷ‖², 2q = (σ_r(Ŷ) - σ_r(Z))/σ_r(Ŷ) < 1. Now

    ‖Z - X‖² = ‖N‖² + 2⟨N, Ŷ - X⟩ + ‖Ŷ - X‖² >= ‖N‖² + (1 - 2q) ‖Ŷ - X‖²,

and 1 - 2q = σ_r(Z)/σ_r(Ŷ). ∎

K is not convex, so Π_K is not nonexpansive; this says what takes the place of it, with no smallness
of the step and no constant: a step that lifts σ_r by the share η costs a factor sqrt(1 + η) at
most, and a step that clips nothing costs nothing. **Sharp**: X is Ŷ with its last singular pair
turned into the normal space. Ours; we know of no earlier statement.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..approximation.constrained_flow import project
from ..conditioning.spectra import draw_tau
from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, violated
from ..sampling import Draw, eps

LIFT = 1.0  # of σ_r(Ŷ)/σ_r(Z)
SAVED = 1.0  # divides ‖Z - Ŷ‖²
ROUNDING = 256.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Z of rank r outside of K, X in K: near to Π_K Z, anywhere, or turned out of its spaces."""
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(3, 9)
    tau = draw_tau(draw)
    cond = (1.0 + tau) * draw.log_uniform(1.0, 20.0)
    U, V = (torch.linalg.qr(draw.normal(k, r + 1)).Q for k in (m, n))
    s = draw.spectrum(r, cond, draw.log_uniform(0.3, 3.0))
    P, Q = draw.frame(r, r), draw.frame(r, r)
    Z = U[:, :r] @ P @ torch.diag(s) @ Q.mT @ V[:, :r].mT
    Y = project(Z, r, tau)
    kind = draw.choose("near", "anywhere", "turned")
    if kind == "turned":
        X = turned(Y, U[:, r:], V[:, r:], r, draw.uniform(0.0, 1.6))
    else:
        step = draw.normal(m, n) * draw.distance() * float(s[-1])
        X = project(Y + step if kind == "near" else draw.normal(m, n), r, tau)
    return {"X": draw.give(X), "Z": draw.give(Z), "r": r, "tau": tau}


def turned(Y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, r: int, angle: float) -> torch.Tensor:
    """Y with its smallest singular pair turned by an angle towards (u, v)."""
    P, s, Qh = torch.linalg.svd(Y, full_matrices=False)
    c, d = math.cos(angle), math.sin(angle)
    p, q = P[:, r - 1 : r], Qh[r - 1 : r].mT
    return Y + s[r - 1] * ((c * p + d * u) @ (c * q + d * v).mT - p @ q.mT)


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """r - 1 equal largest singular values, one smallest, and X with the last pair replaced."""
    draw = Draw(seed, dtype, device)
    r, tau = draw.integer(2, 4), draw.choose(0.3, 1.0)
    U, V = draw.frame(r + 3, r + 1), draw.frame(r + 2, r + 1)
    s = torch.full((r,), (1.0 + tau) * draw.uniform(1.2, 3.0), dtype=torch.float64)
    s[-1] = 1.0
    Z = U[:, :r] @ torch.diag(s) @ V[:, :r].mT
    Y = project(Z, r, tau)
    X = turned(Y, U[:, r:], V[:, r:], r, 0.5 * torch.pi)
    return {"X": draw.give(X), "Z": draw.give(Z), "r": r, "tau": tau}


def check(sample: Sample, *, lift: float = LIFT, saved: float = SAVED) -> Evidence:
    X, Z, r, tau = sample["X"], sample["Z"], sample["r"], sample["tau"]
    Y, kappa = project(Z, r, tau), 1.0 + tau
    # By torch: what the library projects is not judged by the library.
    x, y, z = (torch.linalg.svdvals(A) for A in (X, Y, Z))
    outside_K = {
        "X outside of K": x[0] - kappa * x[r - 1],
        "Ŷ outside of K": y[0] - kappa * y[r - 1],
    }
    inside = ROUNDING * eps(Z) * kappa * float(torch.maximum(x[0], y[0]))
    if (found := violated(outside_K, inside)) is not None:
        return found
    quotient = y[r - 1] / z[r - 1]
    outside = (Z - Y).square().sum()
    bound = lift * quotient * ((Z - X).square().sum() - outside / saved)
    size = float((Z.square().sum() + X.square().sum()) * quotient**2)
    return inequality(
        (Y - X).square().sum(), bound, tolerance=ROUNDING * eps(Z) * size,
        detail={"σ_r(Ŷ)/σ_r(Z)": float(quotient)},
    )  # fmt: skip


def check_nonexpansive(sample: Sample) -> Evidence:
    """As if K were convex."""
    X, Z = sample["X"], sample["Z"]
    Y = project(Z, sample["r"], sample["tau"])
    return inequality((Y - X).norm(), (Z - X).norm(), tolerance=1e-5 * float(Z.norm()))


CLAIM = Claim(
    id="training/projected-step",
    title="T2, one step: what replaces nonexpansiveness on cond <= κ",
    statement=(
        r"\|\Pi_K(Z)-X\|^2\le\frac{\sigma_r(\Pi_K(Z))}{\sigma_r(Z)}"
        r"\big(\|Z-X\|^2-\|Z-\Pi_K(Z)\|^2\big)"
    ),
    hypotheses=("rank Z = r", "X in K = K_τ"),
    source=Source("ours", "theory/training/projected_step.py"),
    sample=sample,
    check=check,
    extremal=(Extremal(attained),),
    controls=(
        Control("0.9 of the quotient", partial(check, lift=0.9), attained),
        Control("more saved than ‖Z - Ŷ‖²", partial(check, saved=0.9), attained),
        Control("nonexpansive, as for convex sets", check_nonexpansive, attained),
    ),
    trials=200,
    float32="256 eps (‖Z‖² + ‖X‖²)(σ_r(Ŷ)/σ_r(Z))²",
)
