r"""L3.6, third part: the derivative of the truncated SVD.

**Statement.** Let A = X + N with X ∈ M_r, N normal at X, ‖N‖₂ < σ_r(X); X = Π_r(A) is the best
approximation. Then Π_r is differentiable at A, with the shape operator S_N of principal-curvatures,

    DΠ_r(A) = (I - S_N)⁻¹ P_X,    ‖DΠ_r(A)‖ = 1 / (1 - ‖N‖₂/σ_r(X))   for r < min(m, n).

**Proof.** Differentiate A(t) = X(t) + N(t) along X(t) = Π_r(A(t)): P_X Ȧ = Ẋ + P_X Ṅ, and P_{X(t)}
N(t) = 0 gives P_X Ṅ = -P_X DP_X[Ẋ] N = -S_N Ẋ. The norm is that of the largest eigenvalue ‖N‖₂/σ_r
of S_N. ∎

The equation of motion of the best approximation in theorem A is this one: Ẋ = (I - S_N)⁻¹ P_X Ẇ.

**Checked** against central differences of the truncated SVD over all mn directions. Absil, Mahony,
Trumpf 2013; Feppon and Lermusiaux 2019. mathematics 3.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lrmanifold import FixedRank

from ..core import Claim, Control, Evidence, Sample, Source, identity, largest
from ..sampling import Draw, eps
from .principal_curvatures import shape_operator, tangent_basis

SIGN = 1.0
NORM = 1.0
ROUNDING = 8.0


def truncate(A: Tensor, r: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[..., :r] @ (s[..., :r, None] * Vh[..., :r, :])


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(2, 6)
    manifold = FixedRank(m, n, r)
    s = draw.spectrum(r, draw.cond(1.0, 10.0), draw.uniform(0.7, 2.0))
    X = manifold.pack(draw.frame(m, r), draw.core(s), draw.frame(n, r))
    U, _, V = manifold.unpack(X)
    Z = draw.normal(m, n)
    N = Z - U @ (U.mT @ Z)
    N = N - (N @ V) @ V.mT
    gap = draw.uniform(0.05, 0.8)  # ‖N‖₂/σ_r
    N = gap * s[-1] * N / torch.linalg.matrix_norm(N, 2)
    return {"manifold": manifold, "X": draw.give(X), "N": draw.give(N), "gap": gap}


def check(sample: Sample, *, sign: float = SIGN, norm: float = NORM) -> Evidence:
    manifold, X, N, gap = (sample[key] for key in ("manifold", "X", "N", "gap"))
    m, n, r = manifold.m, manifold.n, manifold.rank
    A = manifold.to_dense(X) + N
    h = eps(A) ** (1 / 3)
    directions = torch.eye(m * n, dtype=A.dtype, device=A.device).reshape(-1, m, n)
    found = (truncate(A + h * directions, r) - truncate(A - h * directions, r)) / (2 * h)

    basis = tangent_basis(manifold, X)
    S_N = shape_operator(manifold, X, N, basis)
    eye = torch.eye(manifold.dim, dtype=A.dtype, device=A.device)
    dense_basis = manifold.tangent_to_dense(X.expand_as(basis), basis).flatten(1)
    inner = torch.linalg.solve(eye - sign * S_N, dense_basis)  # (I - S_N)⁻¹ P_X in coordinates
    formula = (dense_basis.mT @ inner).mT
    size = float(torch.linalg.matrix_norm(found.flatten(1), 2))
    claimed = norm / (1.0 - gap)
    deviation = largest(((found.flatten(1) - formula).abs().max(), abs(size - claimed)))
    # Third derivatives of Π grow like (σ_r (1 - gap))⁻³; rounding eps ‖A‖/(h gap of the SVD).
    room = float(manifold.svdvals(X)[-1]) * (1.0 - gap)
    scale = (1.0 + room**-3) * (1.0 + float(A.norm()))
    return identity(
        deviation,
        tolerance=ROUNDING * eps(A) ** (2 / 3) * scale,
        detail={"gap": gap, "norm": size, "claimed": claimed},
    )


def far(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """m = 5, n = 4, r = 2, well-conditioned: room for the tolerance to be small."""
    return sample(seed, dtype, device, m=5, n=4, r=2, cond=1.5)


def figure(dtype: torch.dtype, device: torch.device):
    """Norm of the derivative against the relative size of the normal part."""
    from ..plotting import COLOURS, new

    fig, ax = new()
    details = [check(sample(seed, torch.float64, device)).detail for seed in range(80)]
    gap = torch.linspace(0, 0.85, 100)
    ax.plot(gap, 1 / (1 - gap), color=COLOURS[0], label="1/(1 - ‖N‖₂/σ_r)")
    ax.scatter(
        [d["gap"] for d in details], [d["norm"] for d in details], s=20, color=COLOURS[1],
        label="differences of the truncated SVD", zorder=3,
    )  # fmt: skip
    ax.set(xlabel="‖N‖₂/σ_r(X) = σ_{r+1}(A)/σ_r(A)", ylabel="‖DΠ_r(A)‖, operator norm")
    ax.set(title="How sensitive the best rank-r approximation is")
    ax.legend(loc="upper left")
    return fig


CLAIM = Claim(
    id="geometry/projection-derivative",
    title="Derivative of the metric projection onto M_r",
    statement=(
        r"\mathrm D\Pi_r(X+N)=(I-S_N)^{-1}P_X,\quad"
        r"\|\mathrm D\Pi_r\|=\frac{1}{1-\|N\|_2/\sigma_r(X)}"
    ),
    hypotheses=("N normal at X", "‖N‖₂ < σ_r(X)", "r < min(m, n)"),
    source=Source(
        "classical", "Absil, Mahony, Trumpf 2013; Feppon and Lermusiaux 2019; mathematics L3.6"
    ),
    sample=sample,
    check=check,
    controls=(
        Control("I + S_N in place of I - S_N", partial(check, sign=-1.0), far),
        Control("P_X alone", partial(check, sign=0.0), far),
        Control("0.9 of the norm", partial(check, norm=0.9), far),
    ),
    trials=60,
    figure=figure,
    float32="8 eps^(2/3) (1 + (σ_r - ‖N‖₂)⁻³)(1 + ‖A‖): central differences of the SVD",
    kind="identity",
)
