r"""The nearest core with condition number at most κ.

**Statement.** Let S = P diag(σ) Oᵀ be nonsingular and κ = 1 + τ >= 1. The Frobenius-nearest matrix
to S in {S : σ_1 <= κ σ_r} is

    Π(S) = P diag(clip(σ, t, κt)) Oᵀ,   t = (κ Σ_{i<=p} σ_i + Σ_{i>r-q} σ_i) / (κ² p + q),

p = #{σ_i > κt}, q = #{σ_i < t} the one pair that is consistent with its own t. If σ_1 <= κσ_r
nothing moves. Π is idempotent; for κ = 1 it is mean(σ) times the polar factor of S.

**Proof.** By von Neumann's trace inequality the nearest matrix has the singular vectors of S, so
the problem is one of vectors: minimise f(t) = Σ dist(σ_i, [t, κt])², convex and C¹ in t, with
f'(t)/2 = Σ_{σ_i<t} (t - σ_i) + κ Σ_{σ_i>κt} (κt - σ_i). Its zero is the formula. ∎

**Checked** against competitors: the best t found by bracketing f itself, random matrices of the
set, small moves away from Π(S); and ``lrmanifold.linalg.spectral_clip`` must give the same matrix,
``condition_number`` its σ_1/σ_r.
The ratio is (distance to Π(S)) / (distance to the best competitor). mathematics 5 (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Sample, Source, inequality, smallest, violated
from ..sampling import Draw, eps
from .spectra import core_sample, respectral

ROUNDING = 64.0


def threshold(s: Tensor, kappa: float) -> Tensor:
    """The t of the consistent pair (p, q), by trying all pairs. Ties count either way."""
    r, tie = len(s), 8.0 * eps(s)
    for p in range(r + 1):
        for q in range(r + 1 - p):
            if p + q == 0:
                continue
            t = (kappa * s[:p].sum() + s[r - q :].sum()) / (kappa**2 * p + q)
            above = [int((s > kappa * t * (1 + sign * tie)).sum()) for sign in (1, -1)]
            below = [int((s < t * (1 - sign * tie)).sum()) for sign in (1, -1)]
            if above[0] <= p <= above[1] and below[0] <= q <= below[1]:
                return t
    raise AssertionError("no consistent pair: the statement is wrong")


def project(S: Tensor, kappa: float) -> Tensor:
    s = torch.linalg.svdvals(S)
    if s[0] <= kappa * s[-1]:
        return S
    t = threshold(s, kappa)
    return respectral(S, s.clamp(t, kappa * t))


def best_bracketed(s: Tensor, kappa: float) -> Tensor:
    """min_t f(t) by golden section on f: knows nothing of the closed form."""

    def f(t: Tensor) -> Tensor:
        return (s - s.clamp(t, kappa * t)).square().sum()

    low, high = s[-1] / kappa, s[0]
    golden = 0.5 * (5**0.5 - 1)
    for _ in range(80):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if f(a) <= f(b) else (a, high)
    return f(0.5 * (low + high)).sqrt()


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    given = core_sample(seed, dtype, device, **fixed)
    draw = Draw(seed + 1, dtype, device)
    r = given["S"].shape[-1]
    sizes = [[[draw.log_uniform(1e-3, 1.0)]] for _ in range(8)]
    moves = torch.tensor(sizes, dtype=torch.float64) * draw.normal(8, r, r)
    return {**given, "moves": draw.give(moves)}


def check(sample: Sample, *, project: Callable[[Tensor, float], Tensor] = project) -> Evidence:
    S, kappa = sample["S"], 1.0 + sample["tau"]
    nearest = project(S, kappa)
    s = torch.linalg.svdvals(S)
    # Competitors: every matrix of the set reached from around Π(S), and the best t for S itself.
    around = linalg.spectral_clip(nearest + s.mean() * sample["moves"], kappa - 1.0)
    distances = [best_bracketed(s, kappa), *torch.linalg.matrix_norm(around - S)]
    best = smallest(distances)
    measured = float((S - nearest).norm())

    rounding = ROUNDING * eps(S) * float(S.norm())
    values = torch.linalg.svdvals(nearest)
    defects = {
        "infeasible": float(values[0] - kappa * values[-1]),
        "condition_number": float(
            (linalg.condition_number(nearest) * values[-1] - values[0]).abs()
        ),
        "not idempotent": float((project(nearest, kappa) - nearest).norm()),
        "library differs": float((linalg.spectral_clip(S, kappa - 1.0) - nearest).norm()),
    }
    if (found := violated(defects, rounding * (1.0 + kappa))) is not None:
        return found
    return inequality(measured, best, tolerance=rounding)


def unweighted(S: Tensor, kappa: float) -> Tensor:
    """κp + q in place of κ²p + q."""
    s = torch.linalg.svdvals(S)
    if s[0] <= kappa * s[-1]:
        return S
    t = threshold(s, kappa)
    p, q = int((s > kappa * t).sum()), int((s < t).sum())
    t = t * (kappa**2 * p + q) / (kappa * p + q)
    return respectral(S, s.clamp(t, kappa * t))


def lift_the_small(S: Tensor, kappa: float) -> Tensor:
    """Raise σ_i to σ_1/κ: feasible and idempotent, but not nearest."""
    s = torch.linalg.svdvals(S)
    return respectral(S, s.clamp_min(float(s[0]) / kappa)) if s[0] > kappa * s[-1] else S


def mean_clamp(S: Tensor, kappa: float) -> Tensor:
    return linalg.spectral_clip(S, kappa - 1.0, centre="mean")


def figure(dtype: torch.dtype, device: torch.device):
    """One spectrum under exact projection, mean clamp, penalty; and the clamp repeated."""
    from ..plotting import COLOURS, new
    from .penalty_weakly_convex import minimiser

    kappa = 2.0
    s = torch.tensor([4.0, 2.6, 2.2, 1.5, 1.2, 0.7, 0.5, 0.2], dtype=torch.float64)
    S = torch.diag(s)
    fig, (left, right) = new(2, width=5.6, height=4.4)
    index = range(1, len(s) + 1)
    shown = [
        ("S: κ = 20", s, COLOURS[0], "o"),
        ("exact projection", torch.linalg.svdvals(project(S, kappa)), COLOURS[1], "s"),
        ("mean clamp", torch.linalg.svdvals(mean_clamp(S, kappa)), COLOURS[2], "^"),
    ]
    for beta, colour, marker in ((0.25, COLOURS[6], "v"), (0.5, COLOURS[3], "D")):
        values = torch.linalg.svdvals(minimiser(S, beta))
        shown.append((f"penalty, β = {beta:g}", values, colour, marker))
    for name, values, colour, marker in shown:
        cond, moved = float(values[0] / values[-1]), float((values - s).norm())
        label = name if name.startswith("S") else f"{name}: κ = {cond:.2f}, moved {moved:.2f}"
        left.plot(index, values, marker=marker, color=colour, label=label, lw=1)
    left.set(xlabel="index i", ylabel="σ_i", title="One spectrum brought to κ <= 2 (or towards it)")
    left.legend()
    feasible = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    F = torch.diag(feasible)
    exact, clamp = [F], [F]
    for _ in range(8):
        exact.append(project(exact[-1], kappa))
        clamp.append(mean_clamp(clamp[-1], kappa))
    for path, colour, label in (
        (exact, COLOURS[1], "exact projection"),
        (clamp, COLOURS[2], "mean clamp"),
    ):
        top = [float(torch.linalg.svdvals(A)[0]) for A in path]
        right.plot(range(9), top, marker="o", color=colour, label=f"{label}: σ_1")
    right.plot(range(9), [1.0] * 9, "--", color="0.5", label="σ_2 = … = σ_8 (both)")
    right.set(xlabel="applied k times", ylabel="σ", ylim=(0.9, 2.1))
    right.set(title="A feasible spectrum (2, 1, …, 1), κ <= 2")
    right.legend(loc="center right", bbox_to_anchor=(1.0, 0.66))
    return fig


CLAIM = Claim(
    id="conditioning/exact-projection",
    title="The nearest core with cond <= κ, in closed form",
    statement=(
        r"\Pi(S)=P\,\mathrm{diag}(\mathrm{clip}(\sigma,t,\kappa t))O^\top,\quad t=\frac{"
        r"\kappa\sum_{i\le p}\sigma_i+\sum_{i>r-q}\sigma_i}{\kappa^2p+q}"
    ),
    hypotheses=("S nonsingular", "κ >= 1"),
    source=Source("ours", "mathematics 5"),
    sample=sample,
    check=check,
    controls=(
        Control("κp + q in place of κ²p + q", partial(check, project=unweighted)),
        Control("small values raised to σ_1/κ", partial(check, project=lift_the_small)),
        Control("the mean clamp", partial(check, project=mean_clamp)),
    ),
    trials=120,
    figure=figure,
    float32="64 eps ‖S‖ (1 + κ): an SVD and a clip",
)
