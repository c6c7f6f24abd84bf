r"""The classical bounds of Koch and Lubich (2007), and when they apply.

**Statement** (their theorems 5.1 and 6.1, constants from memory). Let ‖Ȧ‖ or ‖F‖ <= μ, σ_r(X) >= ρ,
β = 8μ/ρ. While ‖X - W‖ <= ρ/16 and the right side is at most ρ/8,

    ‖Y - X‖ <= 2β e^{βt} ∫₀ᵗ ‖X - A‖                  on a prescribed path,
    ‖Y - X‖ <= (2β + ℓ) e^{(β+λ)t} ∫₀ᵗ ‖X - W‖        for Ẇ = F(W)

(the printed exponent of the second may be 2β + λ, which is weaker).

Theorem A is of the same form, but with μ/s in place of 8μ/ρ and without the restriction on time:
its constants come from the sharp L3.4 where theirs come from the curvature bounds 8/ρ and 4/ρ. The
detail of this claim says for what share of [0, T] each is applicable and how far apart they are
there.
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Sample, Source
from ._evidence import ROUNDING, along_paths, below
from .a_priori import growth, measured
from .a_priori import sample as draw
from .extremal import constant_defect
from .flows import Measured, cumulative
from .problems import Problem

BETA = 8.0  # β = 8μ/ρ
LEADING = 2.0  # 2β
NEAR, VALID = 1.0 / 16.0, 1.0 / 8.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """The problems of theorem A, nearer to M_r: else the hypotheses hold at almost no time."""
    return draw(seed, dtype, device, **{"noise": 10.0 ** -(2 + seed % 3), "change": 0.3, **fixed})


def bounds(
    at: Problem, leading: float = LEADING, beta: float = BETA
) -> tuple[Measured, dict[str, torch.Tensor]]:
    """Measured quantities; both bounds, and where that of Koch and Lubich is valid (times, B)."""
    assert at.lipschitz is not None
    assert at.one_sided is not None
    q, c = measured(at)
    rho = q["s_X"].cummin(0).values
    rate = beta * c["mu"] / rho
    exponent = ((rate + at.one_sided) * q["t"]).exp()
    classical = (leading * rate + at.lipschitz) * exponent * cumulative(q["t"][:, 0], q["eps"])
    near = below(c["eps"], NEAR * rho)
    a, b = at.one_sided + c["mu"] / c["s"], at.lipschitz + c["mu"] / (c["s"] - c["eps"])
    ours = c["eps"] * b * growth(a, q["t"])
    valid = near & below(classical, VALID * rho)
    ours_valid = below(c["eps"], c["s"])
    return q, {"classical": classical, "ours": ours, "valid": valid, "ours valid": ours_valid}


def check(sample: Sample, *, leading: float = LEADING, beta: float = BETA) -> Evidence:
    at: Problem = sample["problem"]
    q, b = bounds(at, leading, beta)
    valid, met = b["valid"], b["valid"][1:].any(0)
    detail: dict = {
        "problem": at.name,
        "share of time, Koch-Lubich": float(valid.double().mean()),
        "share of time, theorem A": float(b["ours valid"].double().mean()),
    }
    if bool(met.any()):
        both = valid[1:] & b["ours valid"][1:]
        gain = (b["classical"] / b["ours"].clamp_min(1e-300))[1:][both]
        detail["Koch-Lubich / theorem A, median"] = float(gain.median())
    bound = torch.where(valid, b["classical"], b["classical"] + q["e"] + ROUNDING)
    return along_paths(q["e"], bound, met, reason="valid at no time", detail=detail)


def figure(dtype: torch.dtype, device: torch.device):
    """Measured error, theorem A, and Koch-Lubich where it is valid."""
    from ..plotting import COLOURS, new

    fig, axes = new(3, width=4.2, sharey=True)
    for ax, name in zip(axes, ("quadratic", "completion", "prescribed path"), strict=True):
        at = sample(
            3,
            dtype,
            device,
            families=(name,),
            m=10,
            n=8,
            rank=3,
            noise=2e-3,
            change=0.5,
            lowest_curvature=0.0,
        )["problem"]
        q, b = bounds(at, LEADING)
        t, valid = q["t"][1:, 0].cpu(), b["valid"][1:, 0].cpu()
        ax.plot(t, b["ours"][1:, 0].cpu(), color=COLOURS[2], label="theorem A, a-priori")
        classical = b["classical"][1:, 0].cpu()
        ax.plot(t, classical, ":", color=COLOURS[3], label="Koch-Lubich, hypotheses violated")
        ax.plot(t[valid], classical[valid], color=COLOURS[3], linewidth=2.5, label="Koch-Lubich")
        ax.plot(t, q["e"][1:, 0].cpu(), color=COLOURS[1], label="measured ‖Y - X‖")
        share = float(b["valid"][1:, 0].double().mean())
        ax.set(
            xlabel="time t", yscale="log", title=f"{name}: valid {100 * share:.0f} % of the time"
        )
        ax.set_ylim(1e-6, 1e3)
    axes[0].set_ylabel("‖Y - X‖ and bounds, Frobenius norm")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4)
    return fig


CLAIM = Claim(
    id="approximation/koch-lubich",
    title="Koch and Lubich's bounds, and for how long they apply",
    statement=(
        r"\|Y-X\|\le(2\beta+\ell)\,e^{(\beta+\lambda)t}\int_0^t\|X-W\|,\quad \beta=8\mu/\rho"
    ),
    hypotheses=("‖X - W‖ <= ρ/16", "right side <= ρ/8", "σ_r(X) >= ρ, ‖F‖ <= μ"),
    source=Source("published", "Koch and Lubich 2007, theorems 5.1 and 6.1 (from memory)"),
    sample=sample,
    check=check,
    controls=(
        Control(
            "0.9 μ/ρ in place of 2β = 16 μ/ρ",
            partial(check, leading=0.9 / BETA),
            partial(constant_defect, tail=0.02),
        ),
    ),
    loose={"leading": 0.062, "beta": 0.062},
    trials=12,
    figure=figure,
    float32="float64 only: the comparison needs e >> rounding, and says nothing about float32",
)
