r"""A grid of frequencies bounds all of them.

**Statement.** Let K̂(ω) = Σ_{t<k} K_t e^(-iωt) with matrices K_t, in d dimensions, and N > k - 1
frequencies a dimension. Then

    sup_ω ‖K̂(ω)‖₂ <= (1/cos(π (k-1)/(2N)))^d max over the grid of ‖K̂(ω)‖₂.

**Proof.** With the unit vectors u, v of the largest value at ω*, f(ω) = Re(e^(iθ) e^(iω(k-1)/2)
u*K̂(ω)v) is a real trigonometric polynomial (or function of exponential type) of degree (k-1)/2 that
attains its maximum at ω*, so f(ω) >= cos((k-1)/2 |ω - ω*|) f(ω*) for |ω - ω*| <= π/N, by M. Riesz's
inequality. Some grid point is that near; one dimension after the other. ∎

Attained for k = 2 by (1, 1) turned so that the maximum lies between grid points.
mathematics 9 (classical: M. Riesz; Ehlich, Zeller 1964).
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..core import Claim, Control, Evidence, Sample, Source, inequality
from ..sampling import Draw, eps

CONSTANT = 1.0
ROUNDING = 100.0
FINE = 40  # of the sup: this many points between two of the grid


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    k = draw.integer(2, 5)
    kernel = draw.normal(k, draw.integer(1, 3), draw.integer(1, 3))
    return {"kernel": draw.give(kernel), "N": draw.integer(k, 4 * k)}


def between(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A difference filter on an odd grid: its maximum, at π, lies between two points."""
    kernel = torch.tensor([1.0, -1.0], dtype=dtype, device=device)[:, None, None]
    return {"kernel": kernel, "N": 3 + 2 * (seed % 3)}


def _norms(kernel: torch.Tensor, points: int) -> torch.Tensor:
    k = kernel.shape[0]
    omega = 2 * math.pi * torch.arange(points, dtype=torch.float64) / points
    wave = torch.exp(-1j * omega[:, None] * torch.arange(k, dtype=torch.float64))
    transfer = torch.einsum("wt,tab->wab", wave.to(kernel.device), kernel.to(torch.complex128))
    return torch.linalg.matrix_norm(transfer, 2)


def check(sample: Sample, *, constant: float = CONSTANT, factor: bool = True) -> Evidence:
    kernel, N = sample["kernel"], sample["N"]
    k = kernel.shape[0]
    bound = constant * float(_norms(kernel, N).max())
    if factor:
        bound /= math.cos(math.pi * (k - 1) / (2 * N))
    measured = float(_norms(kernel, FINE * N).max())
    return inequality(measured, bound, tolerance=ROUNDING * eps(kernel) * measured)


CLAIM = Claim(
    id="certification/grid",
    title="sup_ω ‖K̂(ω)‖ <= max over N frequencies / cos(π(k-1)/2N)",
    statement=(
        r"\sup_\omega\|\hat K(\omega)\|_2\le"
        r"\frac{\max_{j<N}\|\hat K(2\pi j/N)\|_2}{\cos(\pi(k-1)/(2N))}"
    ),
    hypotheses=("kernels of k positions", "N > k - 1"),
    source=Source("classical", "M. Riesz; Ehlich, Zeller 1964; mathematics 9"),
    sample=sample,
    check=check,
    controls=(
        Control("the grid alone", partial(check, factor=False), between),
        Control("0.99 of it", partial(check, constant=0.99), between),
    ),
    trials=60,
    float32="computed in complex128 from kernels of either dtype",
)
