r"""A convolution with zero padding is a part of a larger circulant.

**Statement.** Let T be a convolution with k x k kernels, stride 1 and zero padding of any width, on
H x H images. Then

    ‖T‖₂ <= max over the frequencies ω of the grid of N = H + k - 1 of ‖K̂(ω)‖₂,
    K̂(ω) = Σ_t K_t e^(-2πi ω·t/N).

**Proof.** Put the image into one of N x N zeros: the circular convolution there gives every output
of T, and others. Its matrix is block diagonal in the Fourier basis, with blocks K̂(ω). ∎

mathematics 9 (published: Sedghi et al. 2019 for the circulant).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Sample, Source, inequality
from ..networks.convolutions import matricised, operator
from ..sampling import Draw, eps

CONSTANT = 1.0
ROUNDING = 200.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    padding = draw.choose("full", "same", "valid")
    k = draw.choose(1, 3) if padding == "same" else draw.integer(1, 3)
    size = draw.integer(max(k, 2), 6)
    kernel = draw.normal(draw.integer(1, 3), draw.integer(1, 3), k, k)
    if seed % 2:
        kernel = kernel.abs()
    return {"kernel": draw.give(kernel), "size": size, "padding": padding}


def positive(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """All ones: the map is nearly k times its matrix."""
    kernel = torch.ones(1, 1, 3, 3, dtype=dtype, device=device)
    return {"kernel": kernel, "size": 6 + seed % 3, "padding": "full"}


def alternating(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Largest at the highest frequency, which a grid of one frequency does not see."""
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=dtype, device=device)
    kernel = torch.outer(sign, sign)[None, None]
    return {"kernel": kernel, "size": 6 + seed % 3, "padding": "full"}


def check(
    sample: Sample, *, constant: float = CONSTANT, matrix: bool = False, only_mean: bool = False
) -> Evidence:
    kernel, size = sample["kernel"], sample["size"]
    T = operator(kernel, size, sample["padding"], 1)
    N = size + kernel.shape[-1] - 1
    if matrix:
        bound = float(torch.linalg.matrix_norm(matricised(kernel), 2))
    else:
        transfer = torch.fft.fft2(kernel, s=(N, N)).flatten(2).movedim(-1, 0)
        if only_mean:
            transfer = transfer[:1]
        bound = float(torch.linalg.matrix_norm(transfer, 2).max())
    bound *= constant
    size_of = float(kernel.abs().sum())
    return inequality(torch.linalg.matrix_norm(T, 2), bound, tolerance=ROUNDING * eps(T) * size_of)


CLAIM = Claim(
    id="certification/zero-padding",
    title="‖T‖ <= max_ω ‖K̂(ω)‖ on the grid of H + k - 1",
    statement=r"\|T\|_2\le\max_{\omega}\|\hat K(\omega)\|_2,\quad N=H+k-1",
    hypotheses=("stride 1", "zero padding of any width"),
    source=Source("published", "Sedghi, Gupta, Long 2019; mathematics 9"),
    sample=sample,
    check=check,
    controls=(
        Control("the norm of the kernel's matrix", partial(check, matrix=True), positive),
        Control("only the frequency 0", partial(check, only_mean=True), alternating),
        Control("0.75 of it", partial(check, constant=0.75), positive),
    ),
    trials=60,
    float32="200 eps of the sum of the kernel's entries",
)
