r"""L3.1: how far row and column spaces can turn.

**Statement.** X, Y of rank r; s_u = ‖P_{U_X} - P_{U_Y}‖₂ is the sine of the largest angle between
their column spaces, s_v that of the row spaces. Then

    s_u, s_v <= ‖X - Y‖₂ / max(σ_r(X), σ_r(Y)).

**Hypothesis.** Equal ranks. With one rank more Y may contain the column space of X, and s_u = 1.

**Proof.** (I - P_{U_Y}) P_{U_X} = (I - P_{U_Y})(X - Y) X⁺, of norm at most ‖X - Y‖₂/σ_r(X). For
projectors of equal rank ‖(I - P')P‖ = ‖(I - P)P'‖ = ‖P - P'‖, so X and Y may change places. ∎

**Sharp.** X = σ u e₁ᵀ with u at angle θ to e₁, and Y = (e₁e₁ᵀ) X: s_u = sin θ, ‖X - Y‖₂ = σ sin θ.

Wedin 1972; Davis and Kahan 1970. mathematics 3.
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, largest
from ..sampling import Draw, dense, eps
from ._pairs import angle, one_sided, pair, smallest, truncated

CONSTANT = 1.0
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return pair(seed, dtype, device, full_rank=True, **fixed)


def check(sample: Sample, *, constant: float = CONSTANT) -> Evidence:
    X, Y, D = sample["X"], sample["Y"], sample["D"]
    measured = largest((angle(X.U, Y.U), angle(X.V, Y.V)))
    bound = constant * torch.linalg.matrix_norm(D, 2) / largest((smallest(X), smallest(Y)))
    return inequality(measured, bound, tolerance=ROUNDING * eps(D) * float(1 + bound))


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    draw = Draw(seed, dtype, device)
    return one_sided(draw.uniform(0.1, 1.5), draw.log_uniform(0.1, 10.0), dtype, device)


def another_rank(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Y = X plus a tiny matrix of rank 1: near to X, of one rank more."""
    draw = Draw(seed, dtype, device)
    X = draw.point(6, 5, 2, 3.0)
    Z = draw.normal(6, 1) @ draw.normal(1, 5)
    Y = truncated(dense(X) + 0.1 * smallest(X) * Z / Z.norm(), 3)
    D = draw.give(dense(X) - dense(Y))
    return {"X": draw.give_point(Y), "Y": draw.give_point(X), "D": D}


def check_without_equal_ranks(sample: Sample) -> Evidence:
    """The bound with σ_r of the matrix of lower rank."""
    X, Y, D = sample["X"], sample["Y"], sample["D"]
    bound = torch.linalg.matrix_norm(D, 2) / smallest(Y)
    return inequality(angle(X.U, Y.U), bound, tolerance=ROUNDING * eps(D))


CLAIM = Claim(
    id="geometry/sin-theta",
    title="Row and column spaces turn by at most ‖X - Y‖₂/σ_r",
    statement=(
        r"\|P_{U_X}-P_{U_Y}\|_2,\ \|P_{V_X}-P_{V_Y}\|_2"
        r"\le \frac{\|X-Y\|_2}{\max(\sigma_r(X),\sigma_r(Y))}"
    ),
    hypotheses=("rank X = rank Y = r",),
    source=Source("classical", "Wedin 1972; mathematics L3.1"),
    sample=sample,
    check=check,
    extremal=(Extremal(attained),),
    controls=(
        Control(
            "0.9 of the constant, where it is attained", partial(check, constant=0.9), attained
        ),
        Control("ranks that differ by one", check_without_equal_ranks, another_rank),
    ),
    trials=200,
    float32="64 eps (1 + bound): frames are orthonormal to eps, σ_r known to eps ‖S‖",
)
