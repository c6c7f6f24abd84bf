r"""Convolutions at an image: the corrected bound, low rank allowed.

**Statement.** Let K = U S Vᵀ be the kernel matrix of a k x k convolution T with stride s (any
rank; zero padding, or circular if s divides the image size), x_p the patches of an image x. Then

    cond(T; x) = ‖T‖₂‖x‖/‖Tx‖ <= κ(S)/cos θ(x),    cos θ(x) = (Σ_p ‖Vᵀx_p‖²)^½ / (⌈k/s⌉ ‖x‖).

**Proof.** ‖T‖ <= ⌈k/s⌉‖K‖ (``convolution_norm.py``), and ‖Tx‖² = Σ_p ‖K x_p‖² >= σ_r(K)² Σ_p
‖Vᵀx_p‖². ∎

Vᵀx_p is what the first of the two convolutions of a low-rank layer computes, so that cos θ is a
by-product of the forward pass. Where there is no bound for the operator
(``convolution_counterexample.py``) there is still one at every image, and it enters the product
bound of a network like a dense layer's. Attained by the all-ones kernel at a constant image. Ours;
not in the mathematics yet.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ..sampling import Draw, eps
from .convolutions import convolve, matricised, operator

CONSTANT = 1.0
IMAGES = 16
ROUNDING = 200.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Low-rank kernels with cond(S) up to 10, Gaussian images or smooth ones."""
    draw = Draw(seed, dtype, device, **fixed)
    padding = draw.choose("circular", "full", "same", "valid")
    k = draw.choose(1, 3) if padding == "same" else draw.integer(1, 3)
    stride = draw.integer(1, 2)
    size = 2 * max(k, 3)
    c_in, c_out = draw.integer(1, 3), draw.integer(1, 6)
    r = draw.integer(1, min(c_out, c_in * k * k))
    V = draw.frame(c_in * k * k, r)
    K = draw.frame(c_out, r) @ draw.core(draw.spectrum(r, draw.cond(1.0, 10.0))) @ V.mT
    x = draw.normal(IMAGES, c_in, size, size)
    if seed % 2:
        x = 0.05 * x + draw.normal(IMAGES, c_in, 1, 1)
    given = {"kernel": K.reshape(c_out, c_in, k, k), "V": V.mT.reshape(r, c_in, k, k), "x": x}
    blocks = {key: draw.give(z) for key, z in given.items()}
    return {**blocks, "rank": r, "padding": padding, "stride": stride}


def constant(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """All-ones kernel, constant image, circular."""
    k = 2 + seed % 2
    ones = torch.ones(1, 1, k, k, dtype=dtype, device=device)
    x = torch.ones(1, 1, 5, 5, dtype=dtype, device=device)
    return {"kernel": ones, "V": ones / k, "x": x, "rank": 1, "padding": "circular", "stride": 1}


def almost_unseen(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A difference filter and nearly constant images: patches near the kernel of K."""
    draw = Draw(seed, dtype, device)
    kernel = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    kernel[0, 0, 0] = torch.tensor([0.5**0.5, -(0.5**0.5)])
    x = 1.0 + 1e-2 * draw.normal(IMAGES, 1, 5, 5)
    give = draw.give(kernel)
    return {
        "kernel": give,
        "V": give,
        "x": draw.give(x),
        "rank": 1,
        "padding": "circular",
        "stride": 1,
    }


def check(sample: Sample, *, constant: float = CONSTANT, cosine: bool = True) -> Evidence:
    s, x = sample, sample["x"]
    kernel, padding, stride = s["kernel"], s["padding"], s["stride"]
    T = operator(kernel, x.shape[-1], padding, stride)
    values = torch.linalg.svdvals(matricised(kernel))
    kappa = values[0] / values[s["rank"] - 1]
    size = x.flatten(1).norm(dim=-1)
    seen = convolve(x, s["V"], padding, stride).flatten(1).norm(dim=-1)
    overlap = math.ceil(kernel.shape[-1] / stride)
    cos = seen / (overlap * size) if cosine else torch.ones_like(size)
    output = convolve(x, kernel, padding, stride).flatten(1).norm(dim=-1)
    measured = torch.linalg.matrix_norm(T, 2) * size / output
    bound = constant * kappa / cos
    ratio = measured / bound
    # The outputs are known to eps ‖K‖ ‖patches‖.
    worst = float((kappa / (seen / (overlap * size))).max())
    holds = bool((ratio <= 1.0 + ROUNDING * eps(x) * worst).all())
    place = int(ratio.argmax())
    detail = {"padding": padding, "cos θ, smallest": float((seen / (overlap * size)).min())}
    ratios = tuple(ratio.tolist())
    return Evidence(
        float(measured[place]), float(bound[place]), holds, True, len(ratios), detail, ratios
    )


CLAIM = Claim(
    id="networks/convolution-corrected",
    title="Convolutions at an image: κ(S)/cos θ, low rank allowed",
    statement=(
        r"\frac{\|T\|_2\|x\|}{\|Tx\|}\le\frac{\kappa(S)}{\cos\theta(x)},\quad "
        r"\cos\theta=\frac{(\sum_p\|V^\top x_p\|^2)^{1/2}}{\lceil k/s\rceil\,\|x\|}"
    ),
    hypotheses=("K = U S Vᵀ of any rank, no dilation", "Tx ≠ 0"),
    source=Source("ours", "theory/networks/convolution_corrected.py"),
    sample=sample,
    check=check,
    extremal=(Extremal(constant),),
    controls=(
        Control("0.9 of it, constant image", partial(check, constant=0.9), constant),
        Control("without the cosine", partial(check, cosine=False), almost_unseen),
    ),
    trials=40,
    float32="200 eps κ/cos θ relative: the output cancels by that",
)
