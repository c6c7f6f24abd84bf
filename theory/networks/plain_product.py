r"""The plain product bound is false for low-rank layers.

**Statement** (that the violations exist). For networks f = W_L σ(... σ(W_1 x)) whose layers have a
kernel, r < n_in,

    cond(f; x) <= Π κ(W_i) Π cond(σ_i; z_i),    κ(W) = ‖W‖₂‖W⁺‖₂,

fails: at most Gaussian inputs of well-conditioned low-rank nets, and at *every* net near the
kernel of its first layer.

**Why.** cond(W; x) = ‖W‖‖x‖/‖Wx‖ = [‖W‖ ‖P_row x‖/‖Wx‖] / cos θ(x), and only the bracket is at most
κ(W). The share of x that lies in the row space, cos θ = ‖Vᵀx‖/‖x‖, is missing; for x → ker W the
condition number is unbounded. The corrected bound is in ``corrected_product.py``. For square
non-singular layers the plain bound is right (control: no violation is found there).

How often depends on how loose the κ are: with three layers of rank 4 in 16 x 16 and slope 0.1,
about 85 of 100 Gaussian inputs for cond <= 1.1, about 30 for cond <= 2, hardly any for Gaussian
factors. So the plain bound fails *most* where a network is best conditioned. mathematics 6 and 8
(ours).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Sample, Source
from ..sampling import Draw
from .random_networks import Net, bounds, random_net

NETS = 100
SIZE, DEPTH, RANK, TAU = 16, 3, 4, 0.1
NEAR = 1e-3  # share of the row space in an input near the kernel
LEAST = 0.5  # of all nets violate the plain bound at a Gaussian input


def sample(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rank: int = RANK,
    tau: float = TAU,
    **fixed,
) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    net = random_net(draw, batch=NETS, sizes=(SIZE,) * (DEPTH + 1), rank=rank, tau=tau)
    return {"net": net, "x": draw.give(draw.normal(NETS, SIZE))}


def near_kernel(net: Net, x: Tensor) -> Tensor:
    """x with all but a small share of its row-space part removed."""
    V = net.V[0]
    row = (V @ (V.mT @ x[..., None]))[..., 0]
    return x - (1.0 - NEAR) * row


def check(sample: Sample) -> Evidence:
    net, x = sample["net"], sample["x"]
    gauss, near = bounds(net, x), bounds(net, near_kernel(net, x))
    violated = float((gauss.measured > gauss.plain).double().mean())
    violated_near = float((near.measured > near.plain).double().mean())
    detail = {
        "violated at Gaussian x": violated,
        "violated near a kernel": violated_near,
        "by a factor up to": float((gauss.measured / gauss.plain).max()),
        "by a factor up to, near a kernel": float((near.measured / near.plain).max()),
    }
    corrected = gauss.measured / gauss.corrected
    detail["cond / corrected bound, min"] = float(corrected.min())
    detail["cond / corrected bound, mean"] = float(corrected.mean())
    detail["cond / corrected bound, max"] = float(corrected.max())
    worst = int((gauss.measured / gauss.plain).argmax())
    holds = violated >= LEAST and violated_near == 1.0
    # A violation is "bound < cond": the claim's inequality is the plain product below the truth.
    measured, bound = float(gauss.plain[worst]), float(gauss.measured[worst])
    return Evidence(measured, bound, holds, True, 1, detail)


CLAIM = Claim(
    id="networks/plain-product-fails",
    title="The plain product bound fails for layers with a kernel",
    statement=(
        r"\exists f,x:\ \mathrm{cond}(f;x)>"
        r"\prod_i\kappa(W_i)\prod_i\mathrm{cond}(\sigma_i;z_i)"
    ),
    hypotheses=("layers of rank 4 in 16 x 16, cond <= 1.1", "LeakyReLU, three layers"),
    source=Source("ours", "mathematics 6 and 8"),
    sample=sample,
    check=check,
    controls=(Control("layers without a kernel", check, partial(sample, rank=SIZE)),),
    trials=4,
    float32="none needed: violations are by factors, not by rounding",
)
