r"""L4.2: the nearest well-conditioned matrix of rank r.

**Statement.** For A ∈ R^{m x n} with singular values σ_1 >= σ_2 >= …, a nearest point of
K_τ = {W ∈ M_r : σ_1(W) <= (1 + τ) σ_r(W)} is

    Π_{K_τ}(A) = U_r diag(proj_Q(σ_1, …, σ_r)) V_rᵀ:

truncate the SVD to rank r, then project the core (claim exact-projection). Unique iff σ_r >
σ_{r+1}.

**Proof.** For W = P diag(w) Oᵀ, von Neumann gives ‖A - W‖² >= ‖A‖² - 2 Σ_{i<=r} σ_i w_i + ‖w‖²,
with equality for the singular vectors of A; what is left is the projection of (σ_1, …, σ_r) onto Q.
∎

So the two projections may be done one after the other, in this order, though K_τ is not convex.

The ratio is (distance to Π(A)) / (distance to the best of many competitors of K_τ: small moves
away, other singular vectors, random points). ``WellConditioned.from_dense`` must agree. mathematics
4.2 (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrmanifold import WellConditioned, linalg

from ..core import Claim, Control, Evidence, Sample, Source, inequality, not_met, violated
from ..sampling import Draw, eps
from .spectra import draw_tau

ROUNDING = 64.0


def project(A: Tensor, r: int, tau: float) -> Tensor:
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[..., :r] @ (linalg.clip_values(s[..., :r], tau)[..., :, None] * Vh[..., :r, :])


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(full_rank=True)
    k = min(m, n)
    s = draw.spectrum(k, draw.cond(1.0, 100.0))
    A = draw.frame(m, k) @ torch.diag(s) @ draw.frame(n, k).mT
    sizes = torch.tensor([[[draw.log_uniform(1e-3, 1.0)]] for _ in range(12)], dtype=torch.float64)
    moves = sizes * draw.normal(12, m, n)
    return {"A": draw.give(A), "moves": draw.give(moves), "r": r, "tau": draw_tau(draw)}


def check(sample: Sample, *, project: Callable[[Tensor, int, float], Tensor] = project) -> Evidence:
    A, r, tau = sample["A"], sample["r"], sample["tau"]
    s = torch.linalg.svdvals(A)
    if r < len(s) and s[r - 1] - s[r] <= 1e-3 * s[0]:
        return not_met("σ_r = σ_{r+1} to 1e-3: not unique")
    nearest = project(A, r, tau)
    found = torch.linalg.svdvals(nearest)
    manifold = WellConditioned(A.shape[0], A.shape[1], r, tau=tau)
    library = manifold.to_dense(manifold.from_dense(A))
    rounding = ROUNDING * eps(A) * float(A.norm()) * (1.0 + tau)
    gap = float((s[r - 1] - s[r]) / s[0]) if r < len(s) else 1.0
    defects = {
        "infeasible": found[0] - (1.0 + tau) * found[r - 1],
        # Singular vectors are known to eps/gap.
        "library differs": (library - nearest).norm() * gap,
        "rank above r": found[r:].sum(),
    }
    if (against := violated(defects, rounding)) is not None:
        return against
    # Points of K_τ around the claimed one, around A, and anywhere; made by the map under test, but
    # any map into K_τ would do.
    size = s.mean()
    starts = torch.cat((nearest + 0.1 * size * sample["moves"], A + size * sample["moves"]))
    U, values, Vh = torch.linalg.svd(starts, full_matrices=False)
    values = linalg.clip_values(values[:, :r], tau)
    competitors = U[:, :, :r] @ (values[:, :, None] * Vh[:, :r])
    swapped = torch.linalg.svd(A, full_matrices=False)
    if r < len(s):  # the (r+1)-st singular pair in place of the r-th
        keep = [*range(r - 1), r]
        w = linalg.clip_values(s[keep], tau)
        other = swapped.U[:, keep] @ (w[:, None] * swapped.Vh[keep])
        competitors = torch.cat((competitors, other[None]))
    best = torch.linalg.matrix_norm(A - competitors).min()
    return inequality((A - nearest).norm(), best, tolerance=rounding)


def clip_first(A: Tensor, r: int, tau: float) -> Tensor:
    """Project all singular values, then keep r of them."""
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :r] @ (linalg.clip_values(s, tau)[:r, None] * Vh[:r])


def mean_clamp(A: Tensor, r: int, tau: float) -> Tensor:
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[:, :r] @ (linalg.clip_values(s[:r], tau, centre="mean")[:, None] * Vh[:r])


CLAIM = Claim(
    id="conditioning/k-tau-projection",
    title="Nearest well-conditioned matrix of rank r: truncate, then clip",
    statement=r"\Pi_{K_\tau}(A)=U_r\,\mathrm{diag}(\mathrm{proj}_Q(\sigma_1,\dots,\sigma_r))V_r^\top",
    hypotheses=("σ_r(A) > σ_{r+1}(A), for uniqueness",),
    source=Source("ours", "mathematics L4.2"),
    sample=sample,
    check=check,
    controls=(
        Control("clip all singular values, then truncate", partial(check, project=clip_first)),
        Control("truncate, then clamp about the mean", partial(check, project=mean_clamp)),
    ),
    trials=100,
    float32="64 eps ‖A‖ (1 + τ), singular vectors to eps/gap",
)
