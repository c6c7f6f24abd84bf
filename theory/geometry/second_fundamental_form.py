r"""L3.6, first part: the second fundamental form of M_r.

**Statement.** Every curve W(t) in M_r with velocity ξ = (U_p, M, V_p) at W = U S Vᵀ has the same
normal acceleration,

    (I - P_W) Ẅ(0) = II(ξ, ξ) = 2 U_p S⁻¹ V_pᵀ.

M plays no part: M_r is curved only where row *and* column space turn at once, and the more the
smaller σ_r. This is why a low-rank flow has trouble with small singular values, and a
well-conditioned one has not.

**Proof.** W(t) = U(t)S(t)V(t)ᵀ in the gauge UᵀU̇ = 0, VᵀV̇ = 0: the only term of Ẅ with columns
outside U and rows outside V is 2 U̇ S V̇ᵀ, and U̇ = U_p S⁻¹, V̇ = V_p S⁻ᵀ. ∎

**Checked** by second differences of curves t ↦ R(tξ) for the library's retractions, which agree in
nothing else. Absil, Mahony, Trumpf 2013; Feppon and Lermusiaux 2019. mathematics 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrmanifold import Factors, FixedRank, retractions

from ..core import Claim, Control, Evidence, Sample, Source, identity
from ..sampling import Draw, eps

ROUNDING = 8.0


def second_form(X: Factors, xi: Factors) -> Tensor:
    return 2.0 * xi.U @ torch.linalg.solve(X.S, xi.V.mT)


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size()
    manifold = FixedRank(m, n, r)
    s = draw.spectrum(r, draw.cond(1.0, 10.0), draw.uniform(0.7, 2.0))
    X = manifold.pack(draw.frame(m, r), draw.core(s), draw.frame(n, r))
    xi = manifold.proju(X, draw.normal(*manifold.point_shape))
    names = retractions.available()
    return {
        "manifold": manifold,
        "name": names[seed % len(names)],
        "X": draw.give(X),
        "xi": draw.give(xi / xi.norm()),
    }


def check(
    sample: Sample, *, second_form: Callable[[Factors, Factors], Tensor] = second_form
) -> Evidence:
    manifold, X, xi = sample["manifold"], sample["X"], sample["xi"]
    retract = retractions.get(sample["name"])
    h = eps(X) ** 0.25
    W = manifold.to_dense(X)
    there, back = (manifold.to_dense(retract(manifold, X, t * xi)) for t in (h, -h))
    acceleration = (there - 2.0 * W + back) / h**2
    tangent = manifold.tangent_to_dense(X, manifold.project_ambient(X, acceleration))
    claimed = second_form(manifold.unpack(X), manifold.unpack(xi))
    deviation = float((acceleration - tangent - claimed).norm())
    sigma = float(manifold.svdvals(X)[-1])
    # Truncation h²/12 ‖d⁴W/dt⁴‖ with derivatives like 1/σ³, rounding 4 eps ‖W‖/h².
    tolerance = ROUNDING * eps(X) ** 0.5 * (float(W.norm()) + sigma**-3)
    return identity(deviation, tolerance=tolerance, detail={"retraction": sample["name"]})


def half(X: Factors, xi: Factors) -> Tensor:
    return 0.5 * second_form(X, xi)


def without_inverse(X: Factors, xi: Factors) -> Tensor:
    return 2.0 * xi.U @ X.S @ xi.V.mT


def well_inside(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    return sample(seed, dtype, device, m=5, n=4, r=1)


CLAIM = Claim(
    id="geometry/second-fundamental-form",
    title="Normal acceleration of curves in M_r",
    statement=r"(I-P_W)\ddot W(0)=\mathrm{II}(\xi,\xi)=2U_pS^{-1}V_p^\top",
    hypotheses=("r < min(m, n) for a normal space", "W(t) twice differentiable, Ẇ(0) = ξ"),
    source=Source("classical", "Absil, Mahony, Trumpf 2013; mathematics L3.6"),
    sample=sample,
    check=check,
    controls=(
        Control("factor 2 forgotten", partial(check, second_form=half), well_inside),
        Control("S in place of S⁻¹", partial(check, second_form=without_inverse)),
    ),
    trials=64,
    float32="8 sqrt(eps) (‖W‖ + σ_r⁻³): second differences with h = eps^(1/4)",
    kind="identity",
)
