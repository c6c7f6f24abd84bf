r"""τ = 0 by QR instead of the polar factor: what it costs.

**Statement.** Near an orthogonal matrix, S = Q (I + E), the polar factor is the nearest orthogonal
matrix, that of a QR (positive diagonal) is not:

    ‖S - polar(S)‖² = Σ e_ii² + ½ Σ_{i<j} (e_ij + e_ji)² + O(‖E‖³),
    ‖S - qr(S)‖²    = Σ e_ii² +   Σ_{i<j} (e_ij + e_ji)² + O(‖E‖³),

so their quotient lies in [1, 2] up to O(‖E‖), and the distances in [1, √2]. In general, for any S
of full rank, ‖S - polar(S)‖ <= ‖S - qr(S)‖. With the best multiples of the factors the e_ii lose
their mean.

**Proof.** polar(I + E) = I + skew(E) + O(E²), residual sym(E). qr(I + E) = I + L - Lᵀ + O(E²) with
L the strictly lower part of E: the residual is upper triangular with entries e_ii and e_ij + e_ji.
∎

The reference code of CondLR resets S to a multiple of the Q of a QR. mathematics 5 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from lrmanifold import linalg

from ..core import (
    Claim,
    Control,
    Evidence,
    Extremal,
    Sample,
    Source,
    inequality,
    severest,
    violated,
)
from ..sampling import Draw, eps

LARGEST = 2.0
OFF_DIAGONAL = 1.0
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    r = int(draw.fixed.get("r", draw.integer(2, 7)))
    E = draw.normal(r, r)
    E = draw.log_uniform(10.0 * eps(dtype) ** 0.5, 0.1) * E / E.norm()
    Q = draw.frame(r, r)
    return {"S": draw.give(Q @ (torch.eye(r, dtype=E.dtype) + E)), "E": draw.give(E)}


def check(sample: Sample, *, off: float = OFF_DIAGONAL, largest: float = LARGEST) -> Evidence:
    S, E = sample["S"], sample["E"]
    polar, qr = ((S - f(S)).square().sum() for f in (linalg.polar, linalg.orthonormalize))
    upper = torch.triu(E + E.mT, diagonal=1).square().sum()
    diagonal = E.diagonal().square().sum()
    # Third order in E, and the rounding of residuals of size ‖E‖.
    size, root = float(E.norm()), S.shape[-1] ** 0.5
    slack = 8.0 * size**3 + ROUNDING * eps(S) * root * size
    expansions = {
        "expansion, polar": (polar - diagonal - 0.5 * upper).abs(),
        "expansion, QR": (qr - diagonal - off * upper).abs(),
    }
    if (found := violated(expansions, slack)) is not None:
        return found
    return severest(
        inequality(polar, qr, tolerance=slack),
        inequality(qr, largest * polar, tolerance=2 * slack),
    )


def symmetric_zero_diagonal(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """E = e(e₁e₂ᵀ + e₂e₁ᵀ): the quotient is 2."""
    draw = Draw(seed, dtype, device)
    E = torch.zeros(3, 3, dtype=torch.float64)
    E[0, 1] = E[1, 0] = 3e-3
    Q = draw.frame(3, 3)
    return {"S": draw.give(Q @ (torch.eye(3, dtype=E.dtype) + E)), "E": draw.give(E)}


CLAIM = Claim(
    id="conditioning/qr-instead-of-polar",
    title="Replacing a core by the Q of a QR: up to √2 farther than polar",
    statement=(
        r"S=Q(I+E):\ \|S-\mathrm{polar}\|^2\simeq"
        r"\sum e_{ii}^2+\tfrac12\sum_{i<j}(e_{ij}+e_{ji})^2,\ "
        r"\|S-\mathrm{qr}\|^2\simeq\sum e_{ii}^2+\sum_{i<j}(e_{ij}+e_{ji})^2"
    ),
    hypotheses=("‖E‖ <= 0.1",),
    source=Source("ours", "mathematics 5"),
    sample=sample,
    check=check,
    extremal=(Extremal(symmetric_zero_diagonal),),
    controls=(
        Control("QR claimed as near as polar", partial(check, off=0.5)),
        Control("0.9 of the quotient 2", partial(check, largest=1.8), symmetric_zero_diagonal),
    ),
    trials=60,
    float32="8 ‖E‖³ + 64 eps sqrt(r) ‖E‖: the expansion, and residuals of size ‖E‖",
)
