r"""How far a second-order retraction is from W + tξ.

**Statement.** Let D = S + tM and t‖M‖₂ < σ_r. Then

    orthographic(tξ) = W + tξ + t² U_p D⁻¹ V_pᵀ   exactly, with P_W(R - W) = tξ,
    ‖svd(tξ) - (W + tξ)‖ <= ‖orthographic(tξ) - (W + tξ)‖ <= t² ‖U_p‖‖V_p‖ / (σ_r - t‖M‖₂)
                         <= t² ‖ξ‖² / (2 (σ_r - t‖M‖₂)).

**Proof.** (U D + tU_p) D⁻¹ (D Vᵀ + tV_pᵀ) multiplied out; the last term is normal. The svd
retraction is the nearest matrix of rank r, and the orthographic one has rank r. σ_r(D) >= σ_r -
t‖M‖₂. ∎

**Sharp** for r = 1, t → 0, where the second singular value is t² ‖U_p‖‖V_p‖/σ (1 + O(t)); in
general one of the two norms may be the spectral one. Absil and Oseledets 2015; the bound is ours.
mathematics 2.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch

from lrmanifold import FixedRank, retractions

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, largest, not_met
from ..sampling import Draw, eps

CONSTANT = 1.0
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(3, 12)
    manifold = FixedRank(m, n, r)
    X = manifold.pack(*draw.point(m, n, r, draw.cond(1.0, 30.0)))
    xi = manifold.proju(X, draw.normal(*manifold.point_shape))
    # From small steps to some for which t‖M‖₂ >= σ_r: those are outside the hypothesis.
    t = 2.0 * draw.distance() * float(manifold.svdvals(X)[-1])
    return {"manifold": manifold, "X": draw.give(X), "xi": draw.give(t * xi / xi.norm())}


def check(sample: Sample, *, constant: float = CONSTANT) -> Evidence:
    manifold, X, xi = sample["manifold"], sample["X"], sample["xi"]
    U_p, M, V_p = manifold.unpack(xi)
    sigma = float(manifold.svdvals(X)[-1])
    room = sigma - float(torch.linalg.matrix_norm(M, 2))
    if room <= 1e-3 * sigma:
        return not_met("t‖M‖₂ >= σ_r")
    S = manifold.unpack(X).S
    W, dW = manifold.to_dense(X), manifold.tangent_to_dense(X, xi)
    normal = U_p @ torch.linalg.solve(S + M, V_p.mT)

    orthographic = retractions.orthographic(manifold, X, xi)
    identity = (manifold.to_dense(orthographic) - (W + dW + normal)).norm()
    back = (manifold.inverse_retr(X, orthographic) - xi).norm()
    error = (manifold.to_dense(retractions.svd(manifold, X, xi)) - (W + dW)).norm()
    bound = constant * float(U_p.norm() * V_p.norm()) / room
    weaker = float(xi.square().sum()) / (2 * room)

    rounding = ROUNDING * eps(X) * float(W.norm() + xi.norm() + normal.norm()) * (1 + sigma / room)
    chain = [float(error), float(normal.norm()), bound, weaker]
    ordered = all(a <= b + rounding for a, b in pairwise(chain))
    exact = largest((identity, back)) <= rounding * (1 + float(manifold.cond(X)))
    evidence = inequality(error, bound, tolerance=rounding, detail={"chain": chain})
    return evidence if ordered and exact else inequality(float("inf"), bound)


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Rank 1, a small step."""
    given = dict(sample(seed, dtype, device, r=1, cond=1.0))
    manifold, X, xi = given["manifold"], given["X"], given["xi"]
    given["xi"] = xi * (0.05 * manifold.svdvals(X)[-1] / xi.norm())
    return given


def check_without_room(sample: Sample) -> Evidence:
    """σ_r(S) + t‖M‖₂ in place of σ_r - t‖M‖₂."""
    manifold, X, xi = sample["manifold"], sample["X"], sample["xi"]
    U_p, M, V_p = manifold.unpack(xi)
    error = manifold.to_dense(retractions.svd(manifold, X, xi)) - manifold.to_dense(X)
    error = error - manifold.tangent_to_dense(X, xi)
    bound = U_p.norm() * V_p.norm() / (manifold.svdvals(X)[-1] + torch.linalg.matrix_norm(M, 2))
    return inequality(error.norm(), bound, tolerance=ROUNDING * eps(X))


def against_the_core(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Rank 1, M = -0.4 S: the core shrinks on the way."""
    given = dict(attained(seed, dtype, device))
    manifold = given["manifold"]
    U_p, _, V_p = manifold.unpack(given["xi"])
    given["xi"] = manifold.pack(U_p, -0.4 * manifold.unpack(given["X"]).S, V_p)
    return given


CLAIM = Claim(
    id="geometry/retraction-error",
    title="svd and orthographic retraction: error bound and exact form",
    statement=(
        r"\|R_{svd}(t\xi)-(W+t\xi)\|\le\|t^2U_pD^{-1}V_p^\top\|"
        r"\le\frac{t^2\|U_p\|\|V_p\|}{\sigma_r-t\|M\|_2}\le\frac{t^2\|\xi\|^2}{2(\sigma_r-t\|M\|_2)}"
    ),
    hypotheses=("t‖M‖₂ < σ_r(W)", "r < min(m, n)"),
    source=Source("ours", "Absil and Oseledets 2015 for the exact form; mathematics 2"),
    sample=sample,
    check=check,
    extremal=(Extremal(attained),),
    controls=(
        Control("0.9 of the constant, rank 1", partial(check, constant=0.9), attained),
        Control("σ_r + t‖M‖₂ in place of σ_r - t‖M‖₂", check_without_room, against_the_core),
    ),
    trials=120,
    float32="64 eps (‖W‖ + ‖tξ‖ + ‖normal term‖)(1 + σ_r/(σ_r - t‖M‖₂)): solves with S + tM",
)
