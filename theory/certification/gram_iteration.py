r"""Gram iteration bounds a spectral norm from above.

**Statement.** With G_1 = AᵀA and G_{k+1} = G_kᵀ G_k, for every T >= 1

    ‖A‖₂ <= ‖G_T‖_F^(1/2^T) <= p^(1/2^(T+1)) ‖A‖₂,    p = min(m, n).

**Proof.** ‖G_T‖₂ = ‖A‖₂^(2^T), and ‖·‖₂ <= ‖·‖_F <= √p ‖·‖₂. ∎

Both ends are attained, by rank 1 and by orthogonal matrices. mathematics 9 (published: Delattre et
al. 2023).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, severest
from ..sampling import Draw, eps

EXPONENT = 1.0
ROUNDING = 100.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(full_rank=True)
    A = draw.normal(m, r) @ draw.normal(r, n)
    if seed % 3 == 0:
        A = torch.linalg.qr(draw.normal(max(m, n), min(m, n))).Q
    return {"A": draw.give(A / torch.linalg.matrix_norm(A, 2)), "T": draw.integer(1, 6)}


def rank_one(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Frobenius' norm is the spectral one."""
    return sample(3 * seed + 1, dtype, device, m=5, n=4, r=1)


def orthogonal(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """All singular values equal: the slowest case."""
    return sample(3 * seed, dtype, device, m=6, n=6)


def check(sample: Sample, *, lower: float = 1.0, exponent: float = EXPONENT) -> Evidence:
    A, T = sample["A"], sample["T"]
    if A.shape[0] < A.shape[1]:
        A = A.mT
    G = A
    for _ in range(T):
        G = G.mT @ G
    found = float(G.norm()) ** (0.5**T)
    true = float(torch.linalg.matrix_norm(A, 2))
    above = A.shape[1] ** (exponent * 0.5 ** (T + 1)) * true
    slack = ROUNDING * eps(A)
    return severest(
        inequality(true, lower * found, tolerance=slack),
        inequality(found, above, tolerance=slack),
    )


CLAIM = Claim(
    id="certification/gram-iteration",
    title="‖A‖ <= ‖G_T‖_F^(1/2^T) <= p^(1/2^(T+1)) ‖A‖",
    statement=r"\|A\|_2\le\|G_T\|_F^{2^{-T}}\le p^{2^{-T-1}}\|A\|_2",
    hypotheses=("G_1 = AᵀA, G_{k+1} = G_kᵀG_k",),
    source=Source("published", "Delattre, Barthélemy, Araujo, Allauzen 2023; mathematics 9"),
    sample=sample,
    check=check,
    extremal=(Extremal(rank_one), Extremal(orthogonal)),
    controls=(
        Control("0.99 of it as a bound", partial(check, lower=0.99), rank_one),
        Control("half the exponent", partial(check, exponent=0.5), orthogonal),
    ),
    trials=60,
    float32="100 eps: norms are 1, so products of norm 1",
)
