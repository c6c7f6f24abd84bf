r"""L3.2: the distance of two tangent spaces, exactly.

**Statement.** For r < min(m, n), as operators on R^{m x n},

    ‖P_X - P_Y‖ = sqrt(1 - (1 - s_u²)(1 - s_v²)),

with the sines s_u, s_v of the largest angles between column and between row spaces.

**Hypothesis.** r < min(m, n). For r = min(m, n) every direction is tangent, P_X = I, and the left
side is 0 whatever the angles.

**Proof.** I - P_X = A_X ⊗ B_X with A = I - UUᵀ, B = I - VVᵀ. For orthoprojectors Π, Π' of equal
rank ‖Π - Π'‖ = sqrt(1 - c²), c the smallest singular value of Π' on range Π. Here c is the product
of those of A_Y on range A_X and of B_Y on range B_X, which are sqrt(1 - s_u²) and sqrt(1 - s_v²). ∎

Checked by the eigenvalues of the mn x mn matrices, which know nothing of angles. mathematics 3
(ours).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Sample, Source, identity
from ..sampling import eps
from ._pairs import angle, pair, projector_distance

ROUNDING = 64.0


def formula(s_u: Tensor, s_v: Tensor) -> Tensor:
    return (s_u**2 + s_v**2 - s_u**2 * s_v**2).clamp_min(0).sqrt()


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return pair(seed, dtype, device, **fixed)


def check(sample: Sample, *, formula: Callable[[Tensor, Tensor], Tensor] = formula) -> Evidence:
    X, Y = sample["X"], sample["Y"]
    s_u, s_v = angle(X.U, Y.U), angle(X.V, Y.V)
    distance = projector_distance(X, Y)
    return identity(
        float((distance - formula(s_u, s_v)).abs()),
        tolerance=ROUNDING * eps(distance),
        detail={"s_u": float(s_u), "s_v": float(s_v), "distance": float(distance)},
    )


def all_of_the_rank(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """r = m < n: the hypothesis is violated."""
    return pair(seed, dtype, device, full_rank=True, m=3, n=6, r=3)


def figure(dtype: torch.dtype, device: torch.device):
    """Every pair on the surface, seen from above: level lines of the formula, points measured."""
    from ..plotting import COLOURS, new

    fig, ax = new()
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    s_u, s_v = torch.meshgrid(grid, grid, indexing="ij")
    levels = [0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97]
    lines = ax.contour(s_u, s_v, formula(s_u, s_v), levels=levels, colors="0.6", linewidths=1)
    ax.clabel(lines, fmt="%.2g", fontsize=8)
    details = [check(sample(seed, dtype, device)).detail for seed in range(240)]
    points = ax.scatter(
        *([d[key] for d in details] for key in ("s_u", "s_v")),
        c=[d["distance"] for d in details], cmap="cividis", vmin=0, vmax=1, s=22, zorder=3,
        edgecolor=COLOURS[0], linewidth=0.3,
    )  # fmt: skip
    fig.colorbar(points, ax=ax, label="measured ‖P_X - P_Y‖")
    ax.set(xlabel="s_u, sine between column spaces", ylabel="s_v, sine between row spaces")
    ax.set(title="Distance of tangent spaces (lines: L3.2)", aspect="equal")
    return fig


CLAIM = Claim(
    id="geometry/projector-distance",
    title="Distance of tangent spaces from two angles, exactly",
    statement=r"\|P_X-P_Y\|_{op}=\sqrt{1-(1-s_u^2)(1-s_v^2)}",
    hypotheses=("rank X = rank Y = r", "r < min(m, n)"),
    source=Source("ours", "mathematics L3.2"),
    sample=sample,
    check=check,
    controls=(
        Control("max(s_u, s_v) instead", partial(check, formula=torch.maximum)),
        Control("sqrt(s_u² + s_v²) instead", partial(check, formula=torch.hypot)),
        Control("r = min(m, n), outside the hypothesis", check, all_of_the_rank),
    ),
    trials=200,
    figure=figure,
    float32="64 eps: both sides are smooth functions of frames orthonormal to eps",
    kind="identity",
)
