r"""The order of every retraction of the library, by slopes.

**Statement.** For a unit tangent vector ξ at W and a geodesic Exp, as t → 0,

    ‖R(tξ) - (W + tξ)‖ = Θ(t²),   ‖R(tξ) - Exp(tξ)‖ = Θ(t³) if R is second order, Θ(t²) if not.

Second order: svd, orthographic, ksl, strang, bug, augmented_bug, parallel_bug. First order:
factored.

**Why.** Second order means P_W(R''(0)) = 0, and a geodesic of the embedded manifold has no
tangential acceleration; both curves then have the same normal one, II(ξ, ξ) (claim
second-fundamental-form). A simultaneous update (U + tU̇)(S + tṠ)(V + tV̇)ᵀ of the factors has the
tangential second-order terms U̇MVᵀ + UMV̇ᵀ. No QR or polar factor afterwards removes them; polar
factors add -½ U(U̇ᵀU̇S + SV̇ᵀV̇)Vᵀ, so that `factored` is first order for M = 0 too.

**Hypotheses.** r < min(m, n), so that there is curvature at all; W well inside M_r. Absil and
Malick 2012; Absil and Oseledets 2015; mathematics 2 and 7. The geodesic is ``FixedRank.expmap``,
integrated to roundoff.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from lrmanifold import FixedRank, retractions

from ..core import Claim, Control, Evidence, Sample, Source, inequality, largest, not_met
from ..plotting import slope
from ..sampling import Draw, eps

ORDER: Mapping[str, int] = {
    "augmented_bug": 2,
    "bug": 2,
    "factored": 1,
    "ksl": 2,
    "orthographic": 2,
    "parallel_bug": 2,
    "strang": 2,
    "svd": 2,
}
TAIL = 3
FLOOR = 30.0  # errors below FLOOR * eps * ‖W‖ are rounding


def ladder(dtype: torch.dtype) -> list[float]:
    """Steps: small enough for the slope, large enough for the rounding."""
    powers = (5, 6, 7, 8, 9, 10) if dtype == torch.float64 else (2.5, 3, 3.5, 4, 4.5, 5)
    return [2.0**-k for k in powers]


def allowed(dtype: torch.dtype) -> float:
    return 0.1 if dtype == torch.float64 else 0.45


def errors(sample: Sample) -> dict[str, list[tuple[float, float]]]:
    """(t, error) against W + tξ and against the geodesic, where above rounding."""
    manifold, X, xi = sample["manifold"], sample["X"], sample["xi"]
    steps = ladder(X.dtype)
    t = torch.tensor(steps, dtype=X.dtype, device=X.device)[:, None, None]
    X, xi = X.expand(len(steps), *X.shape), t * xi  # all steps in one batch
    Y = manifold.to_dense(retractions.get(sample["name"])(manifold, X, xi))
    targets = {
        "line": manifold.to_dense(X) + manifold.tangent_to_dense(X, xi),
        "geodesic": manifold.to_dense(manifold.expmap(X, xi)),
    }
    floor = FLOOR * eps(X) * float(targets["line"][0].norm())
    found = {}
    for key, target in targets.items():
        found[key] = above(floor, steps, torch.linalg.matrix_norm(Y - target).tolist())
    return found


def above(floor: float, steps: list[float], errors: list[float]) -> list[tuple[float, float]]:
    """(step, error) where the error is not rounding; NaN is none, and spoils the slope."""
    return [(t, e) for t, e in zip(steps, errors, strict=True) if not e <= floor]


def tail_slope(points: list[tuple[float, float]]) -> float:
    """Fitted over the TAIL smallest steps whose error is above the rounding."""
    return slope(*zip(*points[-TAIL:], strict=True))


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """A well-conditioned point and a unit tangent vector; the retractions take turns."""
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(4, 12)
    manifold = FixedRank(m, n, r)
    s = draw.spectrum(r, min(draw.cond(1.0, 2.0), 2.0), draw.uniform(0.7, 1.4))
    X = manifold.pack(draw.frame(m, r), draw.core(s), draw.frame(n, r))
    xi = manifold.proju(X, draw.normal(*manifold.point_shape))
    names = retractions.available()
    return {
        "manifold": manifold,
        "name": names[seed % len(names)],
        "X": draw.give(X),
        "xi": draw.give(xi / xi.norm()),
    }


def check(sample: Sample, *, order: Mapping[str, int] = ORDER) -> Evidence:
    name = sample["name"]
    if name not in order:
        return not_met(f"no order is claimed for the retraction {name!r}")
    found = errors(sample)
    if min(len(points) for points in found.values()) < TAIL:
        return not_met("fewer than three errors above the rounding")
    slopes = {key: tail_slope(points) for key, points in found.items()}
    deviation = largest((abs(slopes["line"] - 2.0), abs(slopes["geodesic"] - 1.0 - order[name])))
    return inequality(deviation, allowed(sample["X"].dtype), detail={"name": name, **slopes})


def claiming(name: str, order: int) -> Callable[[Sample], Evidence]:
    return partial(check, order={**ORDER, name: order})


def only(name: str) -> Callable[[int, torch.dtype, torch.device], Sample]:
    return lambda seed, dtype, device: {**sample(seed, dtype, device), "name": name}


def figure(dtype: torch.dtype, device: torch.device):
    """Log-log errors with fitted slopes."""
    from ..plotting import COLOURS, MARKERS, legend_below, new, powers_of_two

    fig, axes = new(2, width=5.0, height=5.2, sharey=True)
    given = dict(sample(3, torch.float64, device, m=9, n=7, r=3, cond=2.0))
    looks = zip(retractions.available(), COLOURS, MARKERS, strict=False)
    for name, colour, marker in looks:
        found = errors({**given, "name": name})
        slopes = " | ".join(f"{tail_slope(found[key]):.2f}" for key in found)
        # Four second-order schemes nearly coincide: hollow markers of growing size.
        look = {"marker": marker, "color": colour, "mfc": "none", "lw": 1.1}
        look["ms"] = 4 + 1.3 * MARKERS.index(marker)
        for ax, points in zip(axes, found.values(), strict=True):
            ax.plot(*zip(*points, strict=True), label=f"{name}: {slopes}", **look)
    for ax, what in zip(axes, ("W + tξ", "the geodesic Exp(tξ)"), strict=True):
        powers_of_two(ax)
        ax.set(xlabel="step t (‖ξ‖ = 1, σ_r ≈ 1)", title=f"R(tξ) against {what}")
    axes[0].set_ylabel("Frobenius distance")
    legend_below(fig, axes[0], columns=3, title="retraction: fitted slope left | right")
    return fig


CLAIM = Claim(
    id="geometry/retraction-order",
    title="Orders of all retractions of M_r",
    statement=(
        r"\|R(t\xi)-(W+t\xi)\|=\Theta(t^2),\quad \|R(t\xi)-\mathrm{Exp}(t\xi)\|=\Theta(t^3)"
        r"\ \text{(factored: }\Theta(t^2))"
    ),
    hypotheses=("r < min(m, n)", "at least three errors above rounding", "generic ξ"),
    source=Source("published", "Absil and Malick 2012; Absil and Oseledets 2015; mathematics 2, 7"),
    sample=sample,
    check=check,
    controls=(
        Control("factored claimed second order", claiming("factored", 2), only("factored")),
        Control("svd claimed third order", claiming("svd", 3), only("svd")),
        Control("ksl claimed first order", claiming("ksl", 1), only("ksl")),
    ),
    trials=60,
    figure=figure,
    float32="last three steps of 0.18 … 1/32 (1/32 … 1/1024), errors > 30 eps ‖W‖; 0.45 (0.1)",
    kind="order",
)
