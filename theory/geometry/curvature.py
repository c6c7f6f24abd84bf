r"""L3.3: how fast tangent spaces turn, in the Frobenius norm.

**Statement.** For X, Y of rank r, near or far,

    ‖P_X - P_Y‖ <= ‖X - Y‖_F / max(σ_r(X), σ_r(Y)).

**Proof.** Say σ_r = σ_r(X). Given the column and row spaces of Y, X = UΣVᵀ is at least
‖X‖² - ‖P_{U_Y} X P_{V_Y}‖² = ‖Σ‖² - tr(CᵀC Σ EᵀE Σ) away, with C = U_YᵀU, E = V_YᵀV. With a = s_u²,
b = s_v² there are unit vectors with CᵀC ⪯ I - a ppᵀ, EᵀE ⪯ I - b qqᵀ. By monotonicity of the trace

    ‖X - Y‖² >= a‖Σp‖² + b‖Σq‖² - ab (pᵀΣq)².

Let x = ‖Σp‖², y = ‖Σq‖², both >= σ_r²; (pᵀΣq)² <= min(x, y). For x <= y the right side is at least
a x (1 - b) + b y >= σ_r² (a + b - ab) = σ_r² ‖P_X - P_Y‖² by L3.2; for y <= x likewise. ∎

**Sharp.** Turn the column space of a rank-1 matrix by θ and keep the nearest point: both sides are
sin θ, at every angle. Before: the constant 2 (Wei, Cai, Chan, Leung 2016, lemma 4.1, from memory)
and 8 ‖X - Y‖/ρ for pairs with ‖X - Y‖ <= ρ/8 (Koch and Lubich 2007, lemma 4.2, from memory); they
are shown beside it. mathematics 3 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps
from ._pairs import one_sided, pair, projector_distance, smallest

CONSTANT = 1.0
WEI = 2.0
KOCH_LUBICH, NEAR = 8.0, 1.0 / 8.0
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return pair(seed, dtype, device, **fixed)


def check(sample: Sample, *, constant: float = CONSTANT) -> Evidence:
    X, Y, D = sample["X"], sample["Y"], sample["D"]
    measured = float(projector_distance(X, Y))
    sigma = float(torch.maximum(smallest(X), smallest(Y)))
    distance = float(D.norm())
    detail = {"distance / σ_r": distance / sigma, "Wei et al.": measured * sigma / distance / WEI}
    if distance <= NEAR * sigma:
        detail["Koch-Lubich"] = measured * sigma / distance / KOCH_LUBICH
    return inequality(
        measured,
        constant * distance / sigma,
        tolerance=ROUNDING * eps(D) * (1 + distance / sigma),
        detail={"measured": measured, **detail},
    )


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    draw = Draw(seed, dtype, device)
    return one_sided(draw.uniform(0.1, 1.5), draw.log_uniform(0.1, 10.0), dtype, device)


def check_with_largest(sample: Sample) -> Evidence:
    """σ_1 in place of σ_r."""
    X, D = sample["X"], sample["D"]
    return inequality(
        projector_distance(X, sample["Y"]), D.norm() / torch.linalg.matrix_norm(X.S, 2)
    )


def figure(dtype: torch.dtype, device: torch.device):
    """Measured turning against the distance of the points, with the three bounds."""
    from ..plotting import COLOURS, legend_below, new

    details = [check(sample(seed, dtype, device)).detail for seed in range(400)]
    fig, ax = new(width=7.0, height=5.2)
    x, y = ([d[key] for d in details] for key in ("distance / σ_r", "measured"))
    ax.scatter(
        x, y, s=14, color=COLOURS[1], alpha=0.6, label="random pairs, 2..9 x 2..9, cond <= 1e3"
    )
    ends = torch.tensor([min(x), 20.0])
    ax.plot(ends, ends, color=COLOURS[0], label="L3.3: 1 · ‖X - Y‖/σ_r (attained)")
    ax.plot(ends, WEI * ends, "--", color=COLOURS[2], label="Wei et al.: 2 · ‖X - Y‖/σ_r")
    near = torch.tensor([min(x), NEAR])
    ax.plot(
        near, KOCH_LUBICH * near, ":", color=COLOURS[3], label="Koch-Lubich: 8, near pairs only"
    )
    ax.axhline(1.0, color="0.6", linewidth=1)
    ax.set(xscale="log", yscale="log", ylim=(min(y) / 2, 3), xlim=(min(x), 20))
    ax.set(xlabel="‖X - Y‖_F / max(σ_r(X), σ_r(Y))", ylabel="‖P_X - P_Y‖, operator norm")
    ax.set(title="How fast tangent spaces turn")
    legend_below(fig, ax)
    return fig


CLAIM = Claim(
    id="geometry/curvature",
    title="Tangent spaces turn by at most ‖X - Y‖_F/σ_r",
    statement=r"\|P_X-P_Y\|_{op}\le\frac{\|X-Y\|_F}{\max(\sigma_r(X),\sigma_r(Y))}",
    hypotheses=("rank X = rank Y = r",),
    source=Source("ours", "mathematics L3.3"),
    sample=sample,
    check=check,
    extremal=(Extremal(attained),),
    controls=(
        Control(
            "0.9 of the constant, where it is attained", partial(check, constant=0.9), attained
        ),
        Control("σ_1 in place of σ_r", check_with_largest),
    ),
    trials=240,
    figure=figure,
    float32="64 eps (1 + bound): frames are orthonormal to eps, X - Y is rounded once",
)
