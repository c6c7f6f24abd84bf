r"""Cholesky-QR after a step: how orthonormal the new frame is.

**Statement.** Let UᵀU = I, UᵀΔ = 0, A = U + Δ. Then

    AᵀA = I + ΔᵀΔ,   cond(A) <= sqrt(1 + ‖Δ‖₂²),

and one pass of Cholesky-QR (R = chol(AᵀA), Q = A R⁻¹) in arithmetic of unit roundoff u satisfies

    ‖QᵀQ - I‖₂ <= (5/64) δ²,   δ = 8 cond(A) sqrt((n r + r(r + 1)) u),   if δ <= 1,

that is O(u (1 + ‖Δ‖₂²)): one pass is enough for an optimizer's steps, two if δ <= 1.

**Proof.** Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015 (constants quoted from memory). The first
line is Pythagoras; equality in it if Δ has a kernel. mathematics 2.

The bound is far from attained: it adds up rounding errors without cancellation. What is attained is
the *power*: cond(A)², see the second control and the picture.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Sample, Source, inequality, not_met
from ..sampling import Draw, eps

CONSTANT = 5.0 / 64.0
POWER = 2.0
ROUNDING = 64.0


def one_pass(A: Tensor) -> Tensor:
    L = torch.linalg.cholesky(A.mT @ A)
    return torch.linalg.solve_triangular(L, A.mT, upper=False).mT


def defect(Q: Tensor) -> float:
    """‖QᵀQ - I‖₂, measured in float64."""
    Q = Q.double()
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return float(torch.linalg.matrix_norm(Q.mT @ Q - eye, 2))


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """‖Δ‖₂ from 10⁻³ to beyond what δ <= 1 allows."""
    draw = Draw(seed, dtype, device, **fixed)
    n = int(draw.fixed.get("n", draw.integer(8, 200)))
    r = int(draw.fixed.get("r", draw.integer(1, min(12, n // 2))))
    U = draw.frame(n, r)
    Z = draw.normal(n, r)
    size = draw.log_uniform(1e-3, 0.1 / math.sqrt(eps(dtype)))
    Delta = Z - U @ (U.mT @ Z)
    left, _, right = torch.linalg.svd(Delta, full_matrices=False)
    s = draw.shares(r).clone()
    s[0], s[-1] = 1.0, (0.0 if r > 1 else 1.0)  # a kernel: cond(A) is then as large as it can be
    Delta = size * left @ torch.diag(s) @ right
    return {"U": draw.give(U), "Delta": draw.give(Delta), "size": size}


def check(sample: Sample, *, constant: float = CONSTANT, power: float = POWER) -> Evidence:
    A = sample["U"] + sample["Delta"]
    n, r = A.shape
    unit = eps(A) / 2
    s = torch.linalg.svdvals(A.double())
    cond, claimed = float(s[0] / s[-1]), math.sqrt(1.0 + sample["size"] ** 2)
    delta2 = 64.0 * cond**2 * (n * r + r * (r + 1)) * unit
    if delta2 > 1.0:
        return not_met("δ > 1: Cholesky may fail")
    if not cond <= claimed * (1 + ROUNDING * eps(A) * claimed):
        return inequality(cond, claimed)
    twice = defect(linalg.orthonormalize(A))
    if not twice <= 6.0 * (n * r + r * (r + 1)) * unit:  # the library's, Cholesky-QR twice
        return inequality(twice, 6.0 * (n * r + r * (r + 1)) * unit)
    measured = defect(one_pass(A))
    bound = constant * delta2 * cond ** (power - 2.0)
    return inequality(
        measured, bound, detail={"cond": cond, "one": measured, "two": twice, "bound": bound}
    )


def large(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Few rows, Δ as large as δ <= 1 allows; in float64, where that is large enough to tell."""
    draw = Draw(seed, torch.float64, device)
    given = dict(sample(seed, torch.float64, device, n=6, r=2))
    size = draw.uniform(0.5, 1.0) * 0.9 / (8 * math.sqrt(18 * eps(torch.float64) / 2))
    given["Delta"] = given["Delta"] * (size / given["size"])
    given["size"] = size
    return given


def figure(dtype: torch.dtype, device: torch.device):
    """Orthogonality against cond(A)."""
    from ..plotting import COLOURS, new

    evidence = [check(sample(seed, dtype, device)) for seed in range(250)]
    details = [e.detail for e in evidence if e.hypotheses_met]
    fig, ax = new()
    x = [d["cond"] for d in details]
    floor = eps(dtype) / 10
    for key, colour, marker, label in (
        ("bound", COLOURS[2], "_", "(5/64) δ², bound for one pass"),
        ("one", COLOURS[1], "o", "one pass"),
        ("two", COLOURS[3], "s", "lrmanifold.linalg.orthonormalize (two)"),
    ):
        y = [max(d[key], floor) for d in details]
        ax.scatter(x, y, s=18, color=colour, marker=marker, label=label)
    line = torch.tensor([min(x), max(x)])
    ax.plot(line, eps(dtype) * line**2, "--", color=COLOURS[0], lw=1, label="eps cond(A)²")
    ax.set(xscale="log", yscale="log", ylabel="‖QᵀQ - I‖₂")
    ax.set(xlabel="cond(A) <= sqrt(1 + ‖Δ‖₂²)", title=f"Cholesky-QR of U + Δ, {str(dtype)[6:]}")
    ax.legend(loc="upper left")
    return fig


CLAIM = Claim(
    id="geometry/cholesky-qr",
    title="Orthogonality of Cholesky-QR after a step",
    statement=(
        r"\mathrm{cond}(U+\Delta)\le\sqrt{1+\|\Delta\|_2^2},\quad \|Q^\top Q-I\|_2\le\tfrac{5}{64}"
        r"\delta^2,\ \delta=8\,\mathrm{cond}(A)\sqrt{(nr+r(r+1))u}\le1"
    ),
    hypotheses=("UᵀU = I, UᵀΔ = 0 to working precision", "δ <= 1"),
    source=Source("published", "Yamamoto et al. 2015; mathematics 2"),
    sample=sample,
    check=check,
    controls=(
        Control("1e-4 of the constant", partial(check, constant=1e-4 * CONSTANT)),
        Control("cond(A) in place of cond(A)²", partial(check, power=1.0), large),
    ),
    loose={"constant": 0.03, "power": 0.8},
    trials=120,
    figure=figure,
    float32="no slack: the bound holds for the unit roundoff of the dtype; QᵀQ measured in float64",
)
