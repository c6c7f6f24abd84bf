r"""Global order of each integrator of Ẏ = P_Y F(t, Y).

**Statement.** On a fixed time, with step h and F smooth, the error against the low-rank flow is
O(h^p):

    p = 2   Strang-KSL, projected RK2 + SVD
    p = 1   KSL, BUG, augmented, parallel and midpoint BUG, projected Euler + SVD,
            factor ODE Euler + QR

where F has a part normal to M_r of order 1. For tangent F some of these are one order better (KSL,
augmented BUG); nothing is claimed about that. Midpoint BUG has order 2 towards the *full* solution,
up to what is not low-rank (Ceruti, Einkemmer, Kusch, Lubich 2024); towards the low-rank flow it has
not: inside a step it follows the normal part of F, and truncation bends that back by O(h²).

**Why.** KSL is a Lie splitting of P_Y = P_V - P_U P_V + P_U, Strang-KSL its symmetric composition;
KSL, BUG and its variants have σ_r-robust proofs of order 1 (Kieri, Lubich, Walach 2016; Ceruti,
Lubich 2022; Ceruti, Kusch, Lubich 2022 and 2024), projected Runge-Kutta of its own order up to the
normal part (Kieri, Vandereycken 2019). For Strang-KSL order 2 is observed; no proof uniform in σ_r
is known to us. Constants from memory are not used: only slopes are checked. mathematics 7 and 8.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Sample, Source, inequality, largest
from ..plotting import slope
from ..sampling import Draw
from .schemes import SCHEMES, dense, dlra, from_dense, integrate, tangent

ORDERS = {
    "KSL": 1.0,
    "Strang-KSL": 2.0,
    "BUG": 1.0,
    "augmented BUG": 1.0,
    "parallel BUG": 1.0,
    "midpoint BUG": 1.0,
    "projected Euler + SVD": 1.0,
    "projected RK2 + SVD": 2.0,
    "factor ODE, Euler + QR": 1.0,
}
TOLERANCE = 0.06
NORMAL_PART = 0.25
STEPS = (16, 32, 64)
REFERENCE_STEPS = 256
BATCH = 8


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """F(t, Y) = A₁Y + YA₂ + c (mask ∘ Y + cos(2t) C), c such that ‖P^⊥F‖ = 0.25 at t = 0."""
    draw = Draw(seed, torch.float64, device, **fixed)
    m, n, r = draw.integer(5, 9), draw.integer(5, 9), int(draw.fixed.get("r", draw.integer(2, 3)))

    def give(*shape: int) -> Tensor:
        return draw.give(draw.normal(BATCH, *shape))

    U, V = (torch.linalg.qr(give(k, r)).Q for k in (m, n))
    values = draw.give(1.0 + draw.shares(BATCH, r))
    A1, A2 = give(m, m) * (0.5 / m**0.5), give(n, n) * (0.5 / n**0.5)
    mask, C = give(m, n), give(m, n) / (m * n) ** 0.5
    start = from_dense((U * values[:, None, :]) @ V.mT, r)

    def unscaled(t: float, Y: Tensor) -> Tensor:
        return mask * Y + torch.cos(torch.tensor(2.0 * t)) * C

    Z = unscaled(0.0, dense(start))
    size = torch.linalg.matrix_norm(Z - tangent(start, Z), keepdim=True)

    def force(t: float, Y: Tensor) -> Tensor:
        return A1 @ Y + Y @ A2 + (NORMAL_PART / size) * unscaled(t, Y)

    return {"force": force, "start": start}


def errors(sample: Sample, names: tuple[str, ...] = tuple(SCHEMES)) -> dict[str, list[float]]:
    """Root mean square over the batch of the final error, for each scheme and number of steps."""
    exact = dlra(sample["force"], sample["start"], REFERENCE_STEPS)
    out: dict[str, list[float]] = {}
    for name in names:
        out[name] = []
        for steps in STEPS:
            Y = dense(integrate(SCHEMES[name], sample["force"], sample["start"], steps))
            error = torch.linalg.matrix_norm(Y - exact)
            out[name].append(float(error.square().mean().sqrt()))
    return out


def check(sample: Sample, *, orders: dict[str, float] = ORDERS) -> Evidence:
    found = errors(sample, tuple(orders))
    fitted = {name: -slope(STEPS, e) for name, e in found.items()}
    deviations = [abs(fitted[name] - p) for name, p in orders.items()]
    return inequality(
        largest(deviations),
        TOLERANCE,
        detail={name: round(p, 2) for name, p in fitted.items()},
        ratios=tuple(d / TOLERANCE for d in deviations),
    )


def figure(dtype: torch.dtype, device: torch.device):
    """Error against step size, with fitted orders."""
    from ..plotting import COLOURS, MARKERS, new

    found = errors(sample(0, dtype, device))
    fig, ax = new(width=7.4, height=4.8)
    h = [1.0 / n for n in STEPS]
    for k, (name, e) in enumerate(found.items()):
        label = f"{name}: {slope(h, e):.2f}"
        colour = (*COLOURS[1:7], COLOURS[0], "0.5", COLOURS[2])[k]
        line = "--" if ORDERS[name] == 2.0 else "-"
        ax.loglog(h, e, line, marker=MARKERS[k % len(MARKERS)], color=colour, label=label)
    ax.set_xticks(h, [f"1/{n}" for n in STEPS])
    ax.minorticks_off()
    ax.set(xlabel="step size h", ylabel="error at t = 1, Frobenius norm, rms of 8 problems")
    ax.set(title="Global order against the low-rank flow")
    ax.legend(title="fitted order", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


CLAIM = Claim(
    id="integrators/order",
    title="Global order of each low-rank integrator",
    statement=(
        r"\|Y_n-Y(t_n)\|=O(h^p),\quad "
        r"p=2:\ \text{Strang-KSL, RK2+SVD};\quad p=1:\ \text{others}"
    ),
    hypotheses=("F smooth, with a normal part", "σ_r of order 1", "substeps solved accurately"),
    source=Source("published", "see the file; Strang-KSL observed (mathematics 7, 8)"),
    sample=sample,
    check=check,
    controls=(
        Control("order 2 for BUG", partial(check, orders={"BUG": 2.0})),
        Control("order 1 for Strang-KSL", partial(check, orders={"Strang-KSL": 1.0})),
        Control("order 2 for KSL", partial(check, orders={"KSL": 2.0})),
    ),
    trials=4,
    figure=figure,
    float32="float64 only: errors of O(h³) a step are compared",
    kind="order",
)
