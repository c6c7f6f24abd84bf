r"""A grid of frequencies bounds all of them.

**Statement.** Let K̂(ω) = Σ_t K_t e^(-iω·t) with matrices K_t, t in a box of k_1 x … x k_d
positions, and N_i > k_i - 1 frequencies in dimension i. Then

    sup_ω ‖K̂(ω)‖₂ <= Π_i 1/cos(π (k_i - 1)/(2N_i)) max over the grid of ‖K̂(ω)‖₂.

**Proof.** With the unit vectors u, v of the largest value at ω*, f(ω) = Re(e^(iθ) e^(iω(k-1)/2)
u*K̂(ω)v) is a real trigonometric polynomial (or function of exponential type) of degree (k-1)/2 that
attains its maximum at ω*, so f(ω) >= cos((k-1)/2 |ω - ω*|) f(ω*) for |ω - ω*| <= π/N, by M. Riesz's
inequality. Some grid point is that near; one dimension after the other. ∎

Attained for k = 2 by the difference filter (1, -1) in each dimension, on a grid of an odd number of
frequencies: the maximum, at π, lies between two of them. Sampled for d = 1, 2 and 3. mathematics 9
(classical: M. Riesz; Ehlich, Zeller 1964).
"""

from __future__ import annotations

import math
from functools import partial, reduce

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps

CONSTANT = 1.0
ROUNDING = 100.0
#: Of the sup, for d dimensions: this many points between two of the grid; even, so that π is one.
FINE = {1: 40, 2: 10, 3: 4}
#: Largest k in d dimensions, and largest N.
LARGEST = {1: (5, 20), 2: (4, 8), 3: (3, 4)}


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Kernels of one to three dimensions in turn, of different size and grid in each of them."""
    draw = Draw(seed, dtype, device, **fixed)
    d = 1 + seed % 3
    k_most, N_most = LARGEST[d]
    k = [draw.integer(2, k_most) for _ in range(d)]
    N = [draw.integer(x, min(4 * x, N_most)) for x in k]
    kernel = draw.normal(*k, draw.integer(1, 3), draw.integer(1, 3))
    return {"kernel": draw.give(kernel), "N": tuple(N)}


def between(seed: int, dtype: torch.dtype, device: torch.device, *, d: int | None = None) -> Sample:
    """The difference filter in each dimension on odd grids: attained."""
    d = 1 + seed % 3 if d is None else d
    line = torch.tensor([1.0, -1.0], dtype=dtype, device=device)
    kernel = reduce(lambda K, x: K[..., None] * x, [line] * d)[..., None, None]
    return {"kernel": kernel, "N": tuple(3 + 2 * ((seed + i) % 2) for i in range(d))}


def _norms(kernel: torch.Tensor, points: tuple[int, ...]) -> torch.Tensor:
    """‖K̂(ω)‖₂ on a grid of that many points in each dimension."""
    transfer = kernel.to(torch.complex128)
    for n in points:  # sums over the first dimension, and puts the frequencies last
        t = torch.arange(transfer.shape[0], dtype=torch.float64, device=kernel.device)
        omega = 2 * math.pi * torch.arange(n, dtype=torch.float64, device=kernel.device) / n
        wave = torch.exp(-1j * t[:, None] * omega)
        transfer = torch.tensordot(transfer, wave, dims=([0], [0]))
    return torch.linalg.matrix_norm(transfer, 2, dim=(0, 1))


def check(sample: Sample, *, constant: float = CONSTANT, dimensions: int | None = None) -> Evidence:
    """`dimensions`: of how many the factor is taken; None: of all."""
    kernel, N = sample["kernel"], sample["N"]
    bound = constant * float(_norms(kernel, N).max())
    for k, n in list(zip(kernel.shape, N, strict=False))[:dimensions]:
        bound /= math.cos(math.pi * (k - 1) / (2 * n))
    fine = FINE[len(N)]
    measured = float(_norms(kernel, tuple(fine * n for n in N)).max())
    return inequality(measured, bound, tolerance=ROUNDING * eps(kernel) * measured)


CLAIM = Claim(
    id="certification/grid",
    title="sup_ω ‖K̂(ω)‖ <= max over a grid / Π cos(π(k_i-1)/2N_i)",
    statement=(
        r"\sup_\omega\|\hat K(\omega)\|_2\le"
        r"\frac{\max_{j}\|\hat K(2\pi j_1/N_1,\dots,2\pi j_d/N_d)\|_2}"
        r"{\prod_i\cos(\pi(k_i-1)/(2N_i))}"
    ),
    hypotheses=("kernels of k_1 x … x k_d positions", "N_i > k_i - 1"),
    source=Source("classical", "M. Riesz; Ehlich, Zeller 1964; mathematics 9"),
    sample=sample,
    check=check,
    extremal=tuple(Extremal(partial(between, d=d)) for d in (1, 2, 3)),
    controls=(
        Control("the grid alone", partial(check, dimensions=0), between),
        Control(
            "the factor of one dimension, for two",
            partial(check, dimensions=1),
            partial(between, d=2),
        ),
        Control("0.99 of it", partial(check, constant=0.99), between),
    ),
    trials=60,
    float32="computed in complex128 from kernels of either dtype",
)
