r"""Activations: the condition number of a vector is not that of its entries.

**Statement.** For σ applied entry by entry,

    cond(σ; z) = max_i |σ'(z_i)| ‖z‖/‖σ(z)‖ <= c_σ := sup|σ'| / inf|σ(t)/t|    for z in [-b, b]ⁿ,

and if σ(0) = 0, c_σ is approached as n → ∞ by one entry where |σ'| is largest and n - 1 where
|σ(t)/t| is smallest. The *scalar* condition number |tσ'(t)/σ(t)| is no bound: for LeakyReLU it is
1 everywhere, while c_σ = 1/slope.

**Proof.** J = diag σ'(z_i), ‖σ(z)‖ >= inf|σ(t)/t| ‖z‖. In the extremal vector ‖z‖/‖σ(z)‖ tends to
1/inf|σ(t)/t|. ∎

mathematics 6 (ours). The picture is the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps
from .random_networks import norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "LeakyReLU(0.1)": partial(functional.leaky_relu, negative_slope=0.1),
    "ELU": functional.elu,
    "tanh": torch.tanh,
    "softsign": functional.softsign,
    "arctan": torch.atan,
    "SiLU": functional.silu,
    "GELU": functional.gelu,
    "softplus": functional.softplus,
    "sigmoid": torch.sigmoid,
}
BOX = 2.0
GRID = 2001
ENTRIES = 40_000  # of the extremal vector
CONSTANT = 1.0
ROUNDING = 20.0


def derivative(name: str, z: Tensor) -> Tensor:
    """σ'(z), by forward-mode differentiation."""
    return torch.func.jvp(ACTIVATIONS[name], (z,), (torch.ones_like(z),))[1]


def extremes(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """sup|σ'|, inf|σ(t)/t| on a grid of the box without 0, their places, and sup|tσ'/σ|."""
    t = torch.linspace(-BOX, BOX, 2 * GRID, dtype=torch.float64, device=device).to(dtype)
    slope, value = derivative(name, t).abs(), (ACTIVATIONS[name](t) / t).abs()
    return {
        "sup": slope.max(),
        "inf": value.min(),
        "steep": t[slope.argmax()],
        "flat": t[value.argmin()],
        "scalar": (slope / value).max(),
    }


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    n = draw.integer(1, 40)
    box = draw.uniform(0.1, BOX)
    z = box * (2.0 * draw.shares(50, n) - 1.0)
    names = list(ACTIVATIONS)
    return {"name": names[seed % len(names)], "z": draw.give(z)}


def extremal(
    seed: int, dtype: torch.dtype, device: torch.device, *, names: tuple[str, ...]
) -> Sample:
    """One steep entry, many flat ones."""
    name = names[seed % len(names)]
    e = extremes(name, dtype, device)
    z = e["flat"].expand(1, ENTRIES).clone()
    z[0, 0] = e["steep"]
    return {"name": name, "z": z}


def check(sample: Sample, *, constant: float = CONSTANT, scalar: bool = False) -> Evidence:
    name, z = sample["name"], sample["z"]
    cond = derivative(name, z).abs().amax(-1) * norm(z) / norm(ACTIVATIONS[name](z))
    e = extremes(name, z.dtype, z.device)
    bound = float(e["scalar"] if scalar else constant * e["sup"] / e["inf"])
    # Between grid points a smooth function is off by O(spacing²) at its extremes.
    tolerance = bound * (ROUNDING * eps(z) + (BOX / GRID) ** 2)
    ratios = tuple((cond / bound).tolist())
    found = inequality(cond.max(), bound, tolerance=tolerance)
    return Evidence(
        found.measured, bound, found.holds, True, len(ratios), {"activation": name}, ratios
    )


def figure(dtype: torch.dtype, device: torch.device):
    """The table: scalar and vector condition number of each activation on the box."""
    from ..plotting import COLOURS, new

    fig, ax = new(width=7.0)
    for k, name in enumerate(ACTIVATIONS):
        e = extremes(name, dtype, device)
        vector, scalar = float(e["sup"] / e["inf"]), float(e["scalar"])
        ax.plot([scalar, vector], [k, k], color="0.7", zorder=1)
        first = k == 0
        ax.scatter(
            scalar,
            k,
            color=COLOURS[2],
            marker="o",
            s=45,
            label="scalar: sup |tσ'/σ|" if first else None,
        )
        ax.scatter(
            vector,
            k,
            color=COLOURS[1],
            marker="s",
            s=45,
            label="vector: sup |σ'| / inf |σ(t)/t|" if first else None,
        )
        ax.annotate(f"{vector:.2f}", (vector, k), (7, -3), textcoords="offset points", fontsize=9)
    ax.set_yticks(range(len(ACTIVATIONS)), list(ACTIVATIONS))
    ax.set(
        xscale="log",
        xlabel=f"condition number for entries in [-{BOX:g}, {BOX:g}]",
        xlim=(0.85, 100),
    )
    ax.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    ax.minorticks_off()
    ax.set(title="Entries can be well-conditioned where the vector is not")
    fig.legend(loc="outside lower center", ncols=2)
    return fig


ZERO_AT_ZERO = ("LeakyReLU(0.1)", "ELU", "tanh", "softsign", "arctan", "SiLU", "GELU")

CLAIM = Claim(
    id="networks/activations",
    title="Condition number of an activation: vector, not scalar",
    statement=(
        r"\mathrm{cond}(\sigma;z)=\max_i|\sigma'(z_i)|\frac{\|z\|}{\|\sigma(z)\|}\le"
        r"\frac{\sup|\sigma'|}{\inf|\sigma(t)/t|}"
    ),
    hypotheses=("z in [-b, b]ⁿ, z ≠ 0", "inf|σ(t)/t| > 0 there"),
    source=Source("ours", "mathematics 6"),
    sample=sample,
    check=check,
    extremal=(Extremal(partial(extremal, names=ZERO_AT_ZERO)),),
    controls=(
        Control(
            "0.9 of it, n = 40 000",
            partial(check, constant=0.9),
            partial(extremal, names=ZERO_AT_ZERO),
        ),
        Control(
            "the scalar condition number",
            partial(check, scalar=True),
            partial(extremal, names=("LeakyReLU(0.1)",)),
        ),
    ),
    trials=45,
    figure=figure,
    float32="20 eps relative, and (b/2001)² for the grid on which sup and inf are taken",
)
