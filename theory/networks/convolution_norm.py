r"""Norm of a convolution from the norm of its kernel matrix.

**Statement.** Let T be the convolution with k x k kernels and stride s, K its matrix C_out x C_in
k². Then

    ‖T‖₂ <= ⌈k/s⌉ ‖K‖₂

for zero padding of any width, and for circular padding if s divides the image size.

**Proof.** ‖Tx‖² = Σ_p ‖K x_p‖² <= ‖K‖² Σ_p ‖x_p‖² over the patches x_p, and every pixel is in at
most ⌈k/s⌉² patches. ∎

Attained for stride 1 by the all-ones kernel on a circular image, at a constant image. With
dilation the count can be larger; it is not claimed. mathematics 6 (classical).
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps
from .convolutions import matricised, operator

CONSTANT = 1.0
ROUNDING = 50.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    padding = draw.choose("circular", "full", "same", "valid")
    k = draw.choose(1, 3) if padding == "same" else draw.integer(1, 3)
    stride = draw.integer(1, 3)
    size = stride * draw.integer(2, 3) if padding == "circular" else draw.integer(k, 6)
    size = max(size, stride * math.ceil(k / stride))
    c_in, c_out = draw.integer(1, 3), draw.integer(1, 6)
    kernel = draw.normal(c_out, c_in, k, k)
    if seed % 2:
        # Low-frequency, low-rank kernels are nearer to the bound.
        kernel = draw.normal(c_out, 1, 1, 1) * (1.0 + 0.2 * draw.normal(1, c_in, k, k))
    return {"kernel": draw.give(kernel), "size": size, "padding": padding, "stride": stride}


def constant_kernel(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    kernel = torch.ones(1, 1, 2 + seed % 2, 2 + seed % 2, dtype=dtype, device=device)
    return {"kernel": kernel, "size": 5, "padding": "circular", "stride": 1}


def check(sample: Sample, *, constant: float = CONSTANT, power: float = 1.0) -> Evidence:
    kernel, stride = sample["kernel"], sample["stride"]
    T = operator(kernel, sample["size"], sample["padding"], stride)
    overlap = math.ceil(kernel.shape[-1] / stride)
    bound = constant * overlap**power * torch.linalg.matrix_norm(matricised(kernel), 2)
    measured = torch.linalg.matrix_norm(T, 2)
    detail = {"padding": sample["padding"], "k, s": (kernel.shape[-1], stride)}
    return inequality(measured, bound, tolerance=ROUNDING * eps(T) * float(bound), detail=detail)


CLAIM = Claim(
    id="networks/convolution-norm",
    title="‖T‖ <= ⌈k/s⌉ ‖K‖ for a convolution",
    statement=r"\|T\|_2\le\lceil k/s\rceil\,\|K\|_2",
    hypotheses=("k x k kernels, stride s, no dilation", "circular: s divides the image size"),
    source=Source("classical", "mathematics 6"),
    sample=sample,
    check=check,
    extremal=(Extremal(constant_kernel),),
    controls=(
        Control("0.9 of it, constant kernel", partial(check, constant=0.9), constant_kernel),
        Control(
            "‖T‖ <= ‖K‖: overlap of patches forgotten", partial(check, power=0.0), constant_kernel
        ),
    ),
    trials=60,
    float32="50 eps of the bound: two spectral norms",
)
