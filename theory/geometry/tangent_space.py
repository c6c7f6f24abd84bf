r"""The tangent space of M_r at W = U S Vᵀ: what it is, and the projector onto it.

**Statement.** Every ξ ∈ T_W M_r is uniquely

    ξ = U M Vᵀ + U_p Vᵀ + U V_pᵀ,   UᵀU_p = 0,  VᵀV_p = 0,

three orthogonal terms, so ‖ξ‖² = ‖M‖² + ‖U_p‖² + ‖V_p‖² and dim T_W M_r = (m + n - r) r. The
orthogonal projector of R^{m x n} onto it is

    P_W Z = UUᵀZ + ZVVᵀ - UUᵀZVVᵀ,  with M = UᵀZV, U_p = (I - UUᵀ)ZV, V_p = (I - VVᵀ)ZᵀU.

**Why.** The velocity of a curve U(t)S(t)V(t)ᵀ is U̇SVᵀ + UṠVᵀ + USV̇ᵀ, whose rows and columns are
of that form; and the form has as many free numbers as M_r has dimensions.

**Checked** with the mn x mn matrix of P_W: symmetric, idempotent, of trace (m + n - r) r; it leaves
velocities of arbitrary curves alone; the blocks are those of ``FixedRank.project_ambient``, and
their norms add up. Koch and Lubich 2007, lemma 4.1; Vandereycken 2013. mathematics 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrmanifold import Factors, FixedRank

from ..core import Claim, Control, Evidence, Sample, Source, identity, worst_of
from ..sampling import Draw, eps

ROUNDING = 64.0


def projector(X: Factors, Z: Tensor) -> Tensor:
    """P_W Z, batched over Z."""
    left, right = X.U @ X.U.mT, X.V @ X.V.mT
    return left @ Z + Z @ right - left @ Z @ right


def dimension(m: int, n: int, r: int) -> int:
    return (m + n - r) * r


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(full_rank=True)
    X = draw.point(m, n, r, draw.cond())
    rates = Factors(draw.normal(m, r), draw.normal(r, r), draw.normal(n, r))  # of any curve
    velocity = rates.U @ X.S @ X.V.mT + X.U @ rates.S @ X.V.mT + X.U @ X.S @ rates.V.mT
    Z = draw.normal(m, n)
    return {
        "X": draw.give_point(X),
        "velocity": draw.give(velocity / velocity.norm()),
        "Z": draw.give(Z / Z.norm()),
    }


def check(
    sample: Sample,
    *,
    projector: Callable[[Factors, Tensor], Tensor] = projector,
    dimension: Callable[[int, int, int], int] = dimension,
) -> Evidence:
    X, Z, velocity = sample["X"], sample["Z"], sample["velocity"]
    (m, n), r = Z.shape, X.S.shape[-1]
    unit = torch.eye(m * n, dtype=Z.dtype, device=Z.device)
    P = projector(X, unit.reshape(m * n, m, n)).reshape(m * n, m * n)

    manifold = FixedRank(m, n, r)
    packed = manifold.pack(*X)
    xi = manifold.project_ambient(packed, Z)
    blocks = manifold.unpack(xi)
    deviations = {
        "P - Pᵀ": (P - P.mT).abs().max(),
        "P² - P": (P @ P - P).abs().max(),
        "tr P - dim, relative": (P.trace() - dimension(m, n, r)).abs() / (m * n),
        "P ξ - ξ for velocities": (projector(X, velocity) - velocity).norm(),
        "library's P Z": (manifold.tangent_to_dense(packed, xi) - projector(X, Z)).norm(),
        # Apart: an error of `project_ambient` that `tangent_to_dense` undoes would not show above.
        "M": (blocks.S - X.U.mT @ Z @ X.V).norm(),
        "U_p": (blocks.U - (Z @ X.V - X.U @ (X.U.mT @ Z @ X.V))).norm(),
        "V_p": (blocks.V - (Z.mT @ X.U - X.V @ (X.V.mT @ Z.mT @ X.U))).norm(),
        "Pythagoras": (
            sum(b.square().sum() for b in blocks) - projector(X, Z).square().sum()
        ).abs(),
        "UᵀU_p, VᵀV_p": torch.maximum((X.U.mT @ blocks.U).norm(), (X.V.mT @ blocks.V).norm()),
    }
    worst, size = worst_of(deviations)
    return identity(size, tolerance=ROUNDING * eps(Z), detail={"worst": worst})


def without_overlap(X: Factors, Z: Tensor) -> Tensor:
    return X.U @ X.U.mT @ Z + Z @ X.V @ X.V.mT


def core_only(X: Factors, Z: Tensor) -> Tensor:
    return X.U @ X.U.mT @ Z @ X.V @ X.V.mT


CLAIM = Claim(
    id="geometry/tangent-space",
    title="Tangent space, its blocks, its projector, its dimension",
    statement=(
        r"P_W Z = UU^\top Z + ZVV^\top - UU^\top ZVV^\top,\quad"
        r"\|\xi\|^2=\|M\|^2+\|U_p\|^2+\|V_p\|^2,\quad \dim T_W=(m+n-r)r"
    ),
    hypotheses=("W = U S Vᵀ of rank r <= min(m, n)", "U, V orthonormal"),
    source=Source("classical", "Koch and Lubich 2007; Vandereycken 2013; mathematics 1"),
    sample=sample,
    check=check,
    controls=(
        Control("- UUᵀZVVᵀ forgotten", partial(check, projector=without_overlap)),
        Control("UUᵀZVVᵀ alone: only S moves", partial(check, projector=core_only)),
        Control("dimension (m + n) r", partial(check, dimension=lambda m, n, r: (m + n) * r)),
    ),
    trials=60,
    float32="64 eps: every quantity is of size 1, frames are orthonormal to eps",
    kind="identity",
)
