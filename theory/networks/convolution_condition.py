r"""Conditioning of a convolution whose kernel matrix has full column rank.

**Statement.** Stride 1, K of full column rank (so C_out >= C_in k²). Then κ(T) = σ_max/σ_min of the
convolution is at most

    κ(K)              for circular and for full zero padding,
    κ(K) 2k/(k+1)     for "same" zero padding, k odd,
    κ(K) k            for "valid".

**Proof.** ‖Tx‖² = Σ_p ‖K x_p‖² lies between σ_min(K)² and σ_max(K)² times Σ_p ‖x_p‖² = Σ_i c_i
x_i², where c_i counts the patches with pixel i: k² everywhere in the first case, between
((k+1)/2)² and k² for "same", between 1 and k² for "valid". ∎

All three are attained by an orthonormal K (then TᵀT = diag c) on images of at least 2k - 1 pixels
a side. The hypothesis is the exception in practice: see ``convolution_counterexample.py``.
mathematics 6 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, largest, not_met
from ..sampling import Draw, eps
from .convolutions import matricised, operator

CONSTANT = 1.0
ROUNDING = 100.0


def factor(padding: str, k: int) -> float:
    """sqrt(c_max / c_min)."""
    return {"circular": 1.0, "full": 1.0, "same": 2.0 * k / (k + 1.0), "valid": float(k)}[padding]


def sample(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    orthonormal: bool = False,
    paddings: tuple[str, ...] = ("circular", "full", "same", "valid"),
    k: int | None = None,
    full_rank: bool = True,
    **fixed,
) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    padding = paddings[seed % len(paddings)]
    k = (3 if padding == "same" else draw.integer(2, 3)) if k is None else k
    c_in = draw.integer(1, 2) if k < 3 else 1
    columns = c_in * k * k
    c_out = columns + draw.integer(0, 3) if full_rank else max(1, columns // 2)
    Q = draw.frame(max(c_out, columns), min(c_out, columns))
    K = Q if full_rank else Q.mT
    if full_rank and not orthonormal:
        K = Q @ draw.core(draw.spectrum(columns, draw.cond(1.0, 20.0)))
    kernel = K.reshape(c_out, c_in, k, k)
    return {"kernel": draw.give(kernel), "size": 2 * k - 1 + draw.integer(0, 1), "padding": padding}


def check(sample: Sample, *, constant: float = CONSTANT, borders: bool = True) -> Evidence:
    kernel, padding = sample["kernel"], sample["padding"]
    K, T = matricised(kernel), operator(kernel, sample["size"], padding)
    if K.shape[0] < K.shape[1]:
        return not_met("K has no full column rank")
    s, t = torch.linalg.svdvals(K), torch.linalg.svdvals(T)
    kappa = s[0] / s[-1]
    bound = constant * kappa * (factor(padding, kernel.shape[-1]) if borders else 1.0)
    # σ_min(T) is known to eps σ_max(T).
    tolerance = ROUNDING * eps(T) * float(bound * bound + bound)
    return inequality(t[0] / t[-1], bound, tolerance=tolerance, detail={"padding": padding})


def check_any_rank(sample: Sample) -> Evidence:
    """The bound without its hypothesis, κ(K) over the non-zero singular values."""
    K, T = (
        matricised(sample["kernel"]),
        operator(sample["kernel"], sample["size"], sample["padding"]),
    )
    s, t = torch.linalg.svdvals(K), torch.linalg.svdvals(T)
    floor = float(eps(T) * t[0])
    bound = float(s[0] / s[-1]) * factor(sample["padding"], sample["kernel"].shape[-1])
    return inequality(float(t[0]) / largest((t[-1], floor)), bound)


#: Attained for each padding.
ORTHONORMAL = [
    Extremal(partial(sample, orthonormal=True, paddings=(padding,)))
    for padding in ("circular", "full", "same", "valid")
]
BORDERS = partial(sample, orthonormal=True, paddings=("same", "valid"), k=3)

CLAIM = Claim(
    id="networks/convolution-condition",
    title="κ(T) <= κ(K) sqrt(c_max/c_min) for full column rank",
    statement=(
        r"\kappa(T)\le\kappa(K)\cdot\{1,\ 1,\ \tfrac{2k}{k+1},\ k\}\quad"
        r"\text{(circular, full, same, valid)}"
    ),
    hypotheses=("K of full column rank, C_out >= C_in k²", "stride 1; k odd for 'same'"),
    source=Source("ours", "mathematics 6"),
    sample=sample,
    check=check,
    extremal=tuple(ORTHONORMAL),
    controls=(
        Control(
            "0.9 of it, orthonormal K",
            partial(check, constant=0.9),
            partial(sample, orthonormal=True),
        ),
        Control("κ(K) alone at zero-padded borders", partial(check, borders=False), BORDERS),
        Control(
            "without full column rank",
            check_any_rank,
            partial(sample, full_rank=False, paddings=("circular",)),
        ),
    ),
    trials=60,
    float32="100 eps κ² relative: σ_min(T) is known to eps σ_max(T)",
)
