r"""Orders of the retractions of the Stiefel manifold, each against the right geodesic.

**Statement.** At X ∈ St(n, r), for a unit tangent vector Δ, ‖R(tΔ) - Exp(tΔ)‖ = Θ(t^{p+1}) with

    polar    p = 2   against the geodesics of the Euclidean metric,
    cayley   p = 2   against those of the *canonical* metric, p = 1 against the Euclidean ones,
    qr       p = 1   against either.

On horizontal Δ (XᵀΔ = 0) the two metrics have the same geodesics (those of the Grassmann manifold):
polar and cayley are both of order 2, qr of order 1 as a frame, but p = 2 as a subspace.

**Why.** polar is the metric projection. Cayley's transform of W = PΔXᵀ - XΔᵀP, P = I - ½XXᵀ, agrees
with exp(W) X to t², and t ↦ exp(tW)X agrees with the canonical geodesic to t². R of the QR of
X + tΔ is upper triangular, where the symmetric root I + ½t²ΔᵀΔ would be right.

**Hypothesis.** n > r >= 2, and Δ generic. For r = 1 (the sphere) polar and QR are one map.

The canonical geodesic is computed here (Edelman, Arias, Smith 1998, eq. 2.45); Wen and Yin 2013.
mathematics 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from lrmanifold import Stiefel

from ..core import Claim, Control, Evidence, Sample, Source, inequality, largest, not_met
from ..sampling import Draw, eps
from .retraction_order import FLOOR, TAIL, above, allowed, tail_slope

Key = tuple[str, str, str]  # retraction, kind of vector, compared with

ORDER: Mapping[Key, int] = {
    ("polar", "general", "euclidean"): 2,
    ("cayley", "general", "canonical"): 2,
    ("cayley", "general", "euclidean"): 1,
    ("qr", "general", "euclidean"): 1,
    ("polar", "horizontal", "euclidean"): 2,
    ("cayley", "horizontal", "euclidean"): 2,
    ("qr", "horizontal", "euclidean"): 1,
    ("qr", "horizontal", "subspace"): 2,
}


def ladder(dtype: torch.dtype) -> list[float]:
    powers = (
        (4, 5, 6, 7, 8, 9, 10) if dtype == torch.float64 else (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5)
    )
    return [2.0**-k for k in powers]


def canonical_geodesic(X: Tensor, Delta: Tensor) -> Tensor:
    """[X Q] exp([[A, -Rᵀ], [R, 0]]) [I; 0] with A = XᵀΔ and QR = (I - XXᵀ)Δ."""
    r = X.shape[-1]
    A = X.mT @ Delta
    A = 0.5 * (A - A.mT)
    Q, R = torch.linalg.qr(Delta - X @ (X.mT @ Delta))
    top, bottom = torch.cat((A, -R.mT), -1), torch.cat((R, torch.zeros_like(A)), -1)
    flow = torch.linalg.matrix_exp(torch.cat((top, bottom), -2))
    return torch.cat((X.expand_as(Q), Q), -1) @ flow[..., :r]


def errors(sample: Sample, key: Key) -> list[tuple[float, float]]:
    name, kind, target = key
    X, Delta = sample["X"], sample[kind]
    steps = ladder(X.dtype)
    t = torch.tensor(steps, dtype=X.dtype, device=X.device)[:, None, None]
    manifold = Stiefel(retraction=name)  # type: ignore[arg-type]
    X = X.expand(len(steps), *X.shape)
    Y = manifold.retr(X, t * Delta)
    if target == "canonical":
        error = Y - canonical_geodesic(X, t * Delta)
    else:
        Z = manifold.expmap(X, t * Delta)
        error = Y - Z if target == "euclidean" else Y - Z @ (Z.mT @ Y)
    sizes = torch.linalg.matrix_norm(error).tolist()
    floor = FLOOR * eps(X)
    return above(floor, steps, sizes)


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """r >= 3: for r = 2 the one entry that makes QR first order may be small by accident."""
    draw = Draw(seed, dtype, device, **fixed)
    r = int(draw.fixed.get("r", draw.integer(3, 5)))
    n = int(draw.fixed.get("n", r + draw.integer(2, 6)))
    X, Z = draw.frame(n, r), draw.normal(n, r)
    horizontal = Z - X @ (X.mT @ Z)
    general = Z - X @ (0.5 * (X.mT @ Z + Z.mT @ X))
    return {
        "X": draw.give(X),
        "general": draw.give(general / general.norm()),
        "horizontal": draw.give(horizontal / horizontal.norm()),
    }


def check(sample: Sample, *, order: Mapping[Key, int] = ORDER) -> Evidence:
    dtype = sample["X"].dtype
    found = {key: errors(sample, key) for key in order}
    if few := [key for key, points in found.items() if len(points) < TAIL]:
        return not_met(f"fewer than {TAIL} errors above the rounding: {few}")
    slopes = {key: tail_slope(points) for key, points in found.items()}
    deviation = largest(abs(slopes[key] - (p + 1)) for key, p in order.items())
    return inequality(deviation, allowed(dtype), detail={"slopes": slopes})


def wrong(name: str, kind: str, target: str, p: int):
    return partial(check, order={**ORDER, (name, kind, target): p})


def figure(dtype: torch.dtype, device: torch.device):
    """Log-log errors; solid where the order is 2."""
    from ..plotting import COLOURS, MARKERS, new, powers_of_two

    fig, axes = new(2, width=5.4, height=4.8, sharey=True)
    given = sample(5, torch.float64, device, n=9, r=3)
    looks = zip(ORDER.items(), COLOURS[1:7] + COLOURS[1:3], MARKERS[:8], strict=True)
    for ((name, kind, target), p), colour, marker in looks:
        t, error = zip(*errors(given, (name, kind, target)), strict=True)
        label = f"{name}, {target}: {tail_slope([*zip(t, error, strict=True)]) - 1:.2f}"
        axes[int(kind == "horizontal")].plot(
            t, error, "-" if p == 2 else "--", marker=marker, color=colour, label=label, mfc="none"
        )
    for ax, title in zip(axes, ("general Δ", "horizontal Δ, XᵀΔ = 0"), strict=True):
        powers_of_two(ax)
        ax.set(xlabel="step t (‖Δ‖ = 1)", title=title, ylim=(1e-10, 1e-2))
        ax.legend(title="retraction, compared with: fitted order", loc="upper left", fontsize=8)
    axes[0].set_ylabel("distance from the geodesic (frames, or subspaces)")
    return fig


CLAIM = Claim(
    id="geometry/stiefel-order",
    title="Orders of polar, QR and Cayley on the Stiefel manifold",
    statement=(
        r"\|R(t\Delta)-\mathrm{Exp}(t\Delta)\|=\Theta(t^{p+1}):\ p_{polar}=2\ \text{(Euclidean)},"
        r"\ p_{Cayley}=2\ \text{(canonical)},\ p_{QR}=1"
    ),
    hypotheses=("n > r >= 2", "Δ generic: leading coefficients not small (r >= 3 is sampled)"),
    source=Source("classical", "Edelman, Arias, Smith 1998; Wen and Yin 2013; mathematics 2"),
    sample=sample,
    check=check,
    controls=(
        Control("QR second order as a frame", wrong("qr", "general", "euclidean", 2)),
        Control(
            "Cayley second order for the Euclidean metric",
            wrong("cayley", "general", "euclidean", 2),
        ),
        Control(
            "polar second order for the canonical metric", wrong("polar", "general", "canonical", 2)
        ),
    ),
    trials=60,
    figure=figure,
    float32="last three steps of 1/2 … 1/32 (1/16 … 1/1024) with errors above 30 eps; 0.45 (0.1)",
    kind="order",
)
