r"""T3: from weights to outputs, and to classes.

**Statement.** Let f_W(x) = W_L φ(W_{L-1} φ(... W_1 x)) with 1-Lipschitz φ, and z_i^W(x) the input
of layer i+1 in f_W (z_0 = x). Then

    ‖f_Y(x) - f_W(x)‖ <= B(x) := Σ_i Π_{j>i} ‖Y_j‖₂ · ‖Y_i - W_i‖₂ · ‖z_{i-1}^W(x)‖.

If the largest entry of f_W(x) exceeds every other by more than √2 B(x), then f_Y has it largest
too. With biases add Π_{j>i}‖Y_j‖₂ ‖b_i^Y - b_i^W‖; a convolution enters with the norm of its map,
which is at most ⌈k/s⌉ times that of its matricised kernel (claim ``networks/convolution-norm``: no
dilation, and circular padding only if s divides the image size); max pooling over disjoint windows
is 1-Lipschitz.

**Proof.** With z_i = φ(W_i z_{i-1}) and y_i = φ(Y_i y_{i-1}): y_i - z_i is at most ‖Y_i‖₂‖y_{i-1} -
z_{i-1}‖ + ‖Y_i - W_i‖₂‖z_{i-1}‖ in norm. Unroll. For the classes: (e_a - e_b)ᵀ(f_Y - f_W) is at
most √2‖f_Y - f_W‖. ∎

**Sharp**: aligned layers, a perturbation of one layer along the signal; for the √2 a perturbation
that takes from the largest entry what it gives to the second. Ours; mathematics 9.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, largest
from ..sampling import Draw, eps

FACTOR = 1.0  # of B
MARGIN = 2.0**0.5
ROUNDING = 200.0
INPUTS = 20


def relu(z: Tensor) -> Tensor:
    return z.clamp_min(0.0)


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Low-rank and dense networks of two to four layers, all or some of whose weights differ."""
    draw = Draw(seed, dtype, device, **fixed)
    depth = draw.integer(2, 4)
    sizes = [draw.integer(3, 9) for _ in range(depth + 1)]
    distance = draw.log_uniform(1e-4, 1.0)
    Y, W = [], []
    for n, m in pairwise(sizes):
        r = draw.integer(1, min(m, n))
        X = (
            draw.frame(m, r)
            @ draw.core(draw.spectrum(r, draw.cond(1.0, 5.0)))
            @ draw.frame(n, r).mT
        )
        step = draw.normal(m, n) * distance * draw.choose(0.0, 1.0, 1.0) / (m * n) ** 0.5
        Y.append(draw.give(X))
        W.append(draw.give(X + step))
    x = draw.normal(INPUTS, sizes[0])
    phi = draw.choose(relu, torch.tanh, torch.abs)
    return {"Y": Y, "W": W, "x": draw.give(x), "phi": phi}


def aligned(
    seed: int, dtype: torch.dtype, device: torch.device, *, layer: int | None = None
) -> Sample:
    """Every layer of Y keeps one direction, that of the signal; one layer of W stretches it."""
    draw = Draw(seed, dtype, device)
    depth, n = draw.integer(2, 4), draw.integer(3, 6)
    u = torch.ones(n, 1, dtype=torch.float64) / n**0.5
    base = u @ u.mT
    moved = draw.integer(0, depth - 1) if layer is None else layer
    W = [base * (1.0 + 0.1 * (i == moved)) for i in range(depth)]
    x = (1.0 + torch.arange(INPUTS, dtype=torch.float64))[:, None] * u.mT
    give = draw.give
    return {"Y": [give(base)] * depth, "W": [give(w) for w in W], "x": give(x), "phi": relu}


def flipped(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """One layer, whose change moves the margin by √2 B; the margin is less, so the class flips."""
    draw = Draw(seed, dtype, device)
    n = draw.integer(2, 5)
    W, e = torch.zeros(n, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    margin = 2.0**0.5 * draw.uniform(0.91, 0.99)
    W[:, 0] = -margin
    W[0, 0], W[1, 0] = margin, 0.0
    step = (e[:, 1:2] - e[:, :1]) @ e[:1] / 2.0**0.5
    x = draw.log_uniform(0.1, 10.0) * e[:1]
    give = draw.give
    return {"Y": [give(W + step)], "W": [give(W)], "x": give(x), "phi": relu}


def bound(Y: list[Tensor], W: list[Tensor], x: Tensor, phi, drop: int | None = None) -> Tensor:
    """B(x) for a batch of inputs; `drop` leaves one layer's term out (control)."""
    z, total = x, torch.zeros_like(x[:, 0])
    for i, (y, w) in enumerate(zip(Y, W, strict=True)):
        change = torch.linalg.matrix_norm(y - w, 2) * z.norm(dim=-1)
        total = torch.linalg.matrix_norm(y, 2) * total + (0.0 if i == drop else change)
        z = z @ w.mT
        z = phi(z) if i + 1 < len(W) else z
    return total


def outputs(W: list[Tensor], x: Tensor, phi) -> Tensor:
    for i, w in enumerate(W):
        x = x @ w.mT
        x = phi(x) if i + 1 < len(W) else x
    return x


def check(
    sample: Sample, *, factor: float = FACTOR, margin: float = MARGIN, drop: int | None = None
) -> Evidence:
    Y, W, x, phi = (sample[key] for key in ("Y", "W", "x", "phi"))
    f_Y, f_W = outputs(Y, x, phi), outputs(W, x, phi)
    B = factor * bound(Y, W, x, phi, drop)
    moved = (f_Y - f_W).norm(dim=-1)
    sizes = [float(torch.linalg.matrix_norm(w, 2)) for w in (*Y, *W)]
    rounding = ROUNDING * eps(x) * float(x.norm(dim=-1).max()) * largest((1.0, *sizes)) ** len(W)
    top = f_W.topk(min(2, f_W.shape[-1]), dim=-1)
    certified = top.values[:, 0] - top.values[:, -1] > margin * B + rounding
    flips = certified & (f_Y.argmax(-1) != top.indices[:, 0])
    ratio = torch.where(moved <= rounding, 0.0 * moved, moved / B.clamp_min(1e-300))
    place = int(ratio.argmax())
    holds = bool((moved <= B + rounding).all()) and not bool(flips.any())
    detail = {"certified same class": float(certified.double().mean()), "flips": int(flips.sum())}
    return Evidence(float(moved[place]), float(B[place]), holds, True, 1, detail)


CLAIM = Claim(
    id="training/outputs",
    title="T3: how far outputs are apart, and when the class is the same",
    statement=(
        r"\|f_Y(x)-f_W(x)\|\le B(x)=\sum_i\prod_{j>i}\|Y_j\|_2\,\|Y_i-W_i\|_2\,\|z^W_{i-1}(x)\|,"
        r"\quad \text{margin of }f_W(x)>\sqrt2\,B(x)\Rightarrow\text{same class}"
    ),
    hypotheses=("activations 1-Lipschitz",),
    source=Source("ours", "theory/training/outputs.py; mathematics 9"),
    sample=sample,
    check=check,
    extremal=(Extremal(aligned), Extremal(flipped)),
    controls=(
        Control("0.9 of it, aligned layers", partial(check, factor=0.9), aligned),
        Control(
            "the first layer's term dropped, that layer moved",
            partial(check, drop=0),
            partial(aligned, layer=0),
        ),
        Control("1 in place of √2", partial(check, margin=1.0), flipped),
    ),
    trials=120,
    float32="200 eps ‖x‖ max(1, largest norm)^L: products of the layers",
)
