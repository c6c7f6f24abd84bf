r"""A well-conditioned low-rank kernel does not make a well-conditioned convolution.

**Statement** (that it fails). There are kernels with κ(K) = 1 whose convolution is singular, or as
badly conditioned as one likes:

* the difference filter K = [1, -1]/√2: rank 1, κ(K) = 1, and T kills every constant image;
* any K of rank r < C_in (stride 1, circular): T has a kernel by counting dimensions;
* most K = U Vᵀ of rank C_in <= r < C_in k² with orthonormal factors: T is injective, but κ(T) >=
  1.2, often far more. Not all of them: a 3 x 3 kernel with a single 1 has rank 1, and T = I.

**Why.** cond(K) controls what happens to each patch's component in the row space of K. An image
whose patches all lie near ker K is nearly annihilated. Full column rank excludes that, low rank in
general does not. So on convolutions the library's constraint bounds κ(K), and the gain from norm to
norm (``convolution_norm.py``), but **not** the operator's condition number. mathematics 6 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Sample, Source, largest
from ..sampling import Draw, eps
from .convolutions import matricised, operator

KINDS = ("difference filter", "r < C_in", "C_in <= r < C_in k²")
LEAST = 1.2  # by what factor κ(T) exceeds κ(K) = 1 at least


def sample(
    seed: int, dtype: torch.dtype, device: torch.device, *, kind: str | None = None, **fixed
) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    kind = KINDS[seed % len(KINDS)] if kind is None else kind
    if kind == KINDS[0]:
        kernel = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
        kernel[0, 0, 0, 0], kernel[0, 0, 0, 1] = 0.5**0.5, -(0.5**0.5)
        return {"kernel": draw.give(kernel), "size": draw.integer(3, 6), "kind": kind}
    c_in, k = draw.integer(2, 3), draw.choose(2, 3)
    if kind == "full column rank":
        c_in, k = 1, 2
    columns = c_in * k * k
    r = {KINDS[1]: c_in - 1, KINDS[2]: draw.integer(c_in, columns // 2)}.get(kind, columns)
    c_out = r + draw.integer(0, 3)
    K = draw.frame(c_out, r) @ draw.frame(columns, r).mT
    return {"kernel": draw.give(K.reshape(c_out, c_in, k, k)), "size": 4, "kind": kind}


def single_one(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """3 x 3, rank 1 of 9, and T = I."""
    kernel = torch.zeros(1, 1, 3, 3, dtype=dtype, device=device)
    kernel[0, 0, 1, 1] = 1.0
    return {"kernel": kernel, "size": 4, "kind": "a single 1"}


def check(sample: Sample) -> Evidence:
    kernel = sample["kernel"]
    K, T = matricised(kernel), operator(kernel, sample["size"], "circular")
    s = torch.linalg.svdvals(K)
    nonzero = s[s > 1e3 * eps(K) * s[0]]
    kappa_K = float(nonzero[0] / nonzero[-1])
    t = torch.linalg.svdvals(T)
    # As an operator on images T has as many singular values as pixels; the missing ones are 0.
    smallest = float(t[-1]) if T.shape[0] >= T.shape[1] else 0.0
    floor = eps(T) * float(t[0])
    kappa_T = float(t[0]) / largest((smallest, floor))
    detail = {"kind": sample["kind"], "κ(K)": kappa_K, "κ(T)": kappa_T}
    # The statement is an inequality the other way: κ(K) <= κ(T)/1.2.
    return Evidence(LEAST * kappa_K, kappa_T, LEAST * kappa_K <= kappa_T, True, 1, detail)


CLAIM = Claim(
    id="networks/convolution-counterexample",
    title="κ(K) = 1 does not bound κ(T) for low-rank kernels",
    statement=(
        r"\exists K:\ \kappa(K)=1,\ \kappa(T)=\infty;\quad "
        r"\text{random }K\text{ of rank }r<C_{in}k^2:\ \kappa(T)\ge1.2\,\kappa(K)"
    ),
    hypotheses=("the difference filter, or random low-rank kernels", "stride 1, circular"),
    source=Source("ours", "mathematics 6"),
    sample=sample,
    check=check,
    controls=(
        Control("kernels of full column rank", check, partial(sample, kind="full column rank")),
        Control("every kernel of low rank: not the one with a single 1", check, single_one),
    ),
    trials=60,
    float32="σ_min(T) below eps σ_max(T) counts as eps σ_max(T)",
)
