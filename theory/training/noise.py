r"""T5: independent noise. Mean squared distance of order ε² + h² + hσ².

**Statement.** W⁺ = W + h(F(W) + ζ_k) and Y⁺ = R_Y(hP_Y(F(Y) + η_k)), where ζ_k and η_k are
independent of each other and of the past, have mean 0 and E‖·‖² <= σ²: two trainings on *different*
minibatches. Let ‖F + ζ‖, ‖F + η‖ <= μ, F ℓ-Lipschitz with one-sided constant λ, and let X = Π_r W,
‖W - X‖ <= ε, σ_r(X), σ_r(Y) >= s, ε + 2hμ < s almost surely up to step k, and Y(0) = X(0). With C,
a, g of T1's a-priori form (svd retraction) and A = max(0, 2a + 1 + 4hg²),

    E‖Y_k - X_k‖² <= (e^{Akh} - 1)/A · [(1 + 4h) C² + 4hσ²],    C = O(ε + h)

(kh in place of the quotient for A = 0),

so E‖Y_k - W_k‖² = O(ε² + h² + hσ²) on a fixed time. (Up to the first step at which a hypothesis
fails, in general: stop both trainings there.)

**Proof.** In T1's expansion ⟨Y-X, P_Yη - P_Xζ⟩ has mean 0 given the past, because P_X, P_Y, X, Y
are known; d and ρ stay below the bounds of T1's a-priori form for every value of the noise. And
E‖P_Yη - P_Xζ‖² <= 2σ² by independence. With 2hCe <= he² + hC² and ‖u + v‖² <= 2‖u‖² + 2‖v‖²,

    E e⁺² <= (1 + 2ha) E e² + hE e² + hC² + h²(4g²E e² + 4C² + 4σ²) <= (1 + hA) E e² + h(1 + 4h)C² +
    4h²σ².

Sum: h Σ_{j<k} (1 + hA)^j = ((1 + hA)^k - 1)/A <= (e^{Akh} - 1)/A, as A >= 0. ∎

**The h² cannot be dropped.** Let W_k = A(kh) be points of a path in M_r and F the difference
quotient, so that ε = σ = 0. Then X = W, and yet ‖Y - W‖ falls like h for the retraction "factored",
like h² for "svd" and "ksl"; it is 0 for "orthographic", the inverse of the projection to the
tangent space. A control computes it. Whether h⁴ is enough for retractions of second order is open
(README).

With the *same* minibatches the noise cancels to first order, and T1 has no σ at all.

Checked on 256 seeds at once, started at the minimum, so that noise is all that moves: the
inequality, and a bootstrap interval (95 %) for the slope of log E‖Y - W‖² in h, which must lie
around 1 and not around 2. Ours.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..approximation.problems import Batch
from ..core import Claim, Control, Evidence, Sample, Source, inequality, largest
from ..paths import Rotation
from ._steps import best, retracted, tangent

ORDER = 1.0
SIZE = 1.0  # factor of the bound
TOLERANCE = 0.12
SEEDS, RESAMPLED = 256, 1000
TIME, SIGMA = 1.0, 0.2
LADDER = (8, 16, 32, 64)
#: Weights in [½, 1]: ℓ = 1, λ = -½.
LIPSCHITZ, ONE_SIDED = 1.0, -0.5


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """One problem F(W) = -weights ∘ (W - X₀), X₀ of rank r, and 256 independent noises for both."""
    draw = Batch(seed, device, 1)
    m, n, r = draw.integer(4, 6), draw.integer(4, 5), draw.integer(1, 2)
    X0 = draw.low_rank(m, n, draw.values(r, 1.5))
    weights = draw.uniforms(m, n, low=0.5, high=1.0)
    return {"X0": X0, "weights": weights, "r": r, "seed": seed}


def train(given: Sample, steps: int) -> dict[str, Tensor]:
    """Both trainings for all seeds: squared distances at the end (SEEDS,), and ε, s, μ."""
    X0, weights, r, h = given["X0"], given["weights"], given["r"], TIME / steps
    W = X0.expand(SEEDS, -1, -1)
    Y, noise = W, Batch(given["seed"] + 17 * steps, X0.device, SEEDS)
    eps, s, mu = (torch.tensor(v, dtype=W.dtype) for v in (0.0, float("inf"), 0.0))
    for _ in range(steps):
        at = best(Y, r)
        FW = -weights * (W - X0) + SIGMA * noise.units(*W.shape[-2:])
        FY = -weights * (Y - X0) + SIGMA * noise.units(*W.shape[-2:])
        mu = torch.stack([mu, *(torch.linalg.matrix_norm(F).max().cpu() for F in (FW, FY))]).max()
        Y, W = retracted(Y, h * tangent(at, FY), r, "svd"), W + h * FW
        X = best(W, r)
        eps = torch.maximum(eps, torch.linalg.matrix_norm(W - X.dense).max().cpu())
        s = torch.stack([s, at.s[..., -1].min().cpu(), X.s[..., -1].min().cpu()]).min()
    return {
        "to W": (Y - W).square().sum((-2, -1)),
        "to X": (Y - X.dense).square().sum((-2, -1)),
        "eps": eps,
        "s": s,
        "mu": mu,
    }


def bound(steps: int, q: dict[str, Tensor]) -> tuple[float, bool]:
    """The bound on E‖Y - X‖², and whether its hypotheses are met."""
    h, eps, s, mu = TIME / steps, float(q["eps"]), float(q["s"]), float(q["mu"])
    gap = s - eps - 2.0 * h * mu
    if gap <= 0.0:
        return float("inf"), False
    a, g = ONE_SIDED + mu / s, LIPSCHITZ + mu / s
    C = LIPSCHITZ * eps + mu * (eps + 1.5 * h * mu) / gap + h * mu * mu / (2.0 * (s - h * mu))
    A = largest((0.0, 2.0 * a + 1.0 + 4.0 * h * g * g))
    growth = math.expm1(A * TIME) / A if A else TIME
    return growth * ((1.0 + 4.0 * h) * C * C + 4.0 * h * SIGMA**2), True


def interval(squares: Tensor, seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the slope of log mean in log h; squares (len(LADDER), SEEDS)."""
    generator = torch.Generator().manual_seed(seed)
    x = -torch.tensor(LADDER, dtype=torch.float64).log()
    x = x - x.mean()
    means = []
    for row in squares.cpu():  # the runs of different h are independent: resampled apart
        index = torch.randint(SEEDS, (RESAMPLED, SEEDS), generator=generator)
        means.append(row[index].mean(-1).log())
    slopes = (x[:, None] * torch.stack(means)).sum(0) / x.square().sum()
    low, high = slopes.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def check(sample: Sample, *, order: float = ORDER, size: float = SIZE) -> Evidence:
    rows = [train(sample, steps) for steps in LADDER]
    low, high = interval(torch.stack([q["to W"] for q in rows]), sample["seed"])
    inside, shares = True, []
    for steps, q in zip(LADDER, rows, strict=True):
        limit, met = bound(steps, q)
        if met:
            shares.append(float(q["to X"].mean()) / limit)
            inside = inside and shares[-1] <= size
    worst = largest((abs(low - order), abs(high - order)))
    detail = {
        "slope, 95 % bootstrap interval": [low, high],
        "E‖Y-X‖² / bound, largest": largest(shares) if shares else float("nan"),
        "steps with met hypotheses": len(shares),
    }
    return Evidence(worst, TOLERANCE, worst <= TOLERANCE and inside, True, 1, detail)


def path_in_the_manifold(given: Sample, steps: int, retraction: str) -> tuple[float, float]:
    """‖Y - W‖ at time 1 on a turning path W in M_r, without noise; and ε."""
    X0, r, h = given["X0"], given["r"], TIME / steps
    draw = Batch(given["seed"] + 1, X0.device, 1)
    R1, R2 = (Rotation.random(draw.normals(k, k), 1.0) for k in X0.shape[-2:])

    def at(k: int) -> Tensor:
        t = torch.tensor(k * h, dtype=X0.dtype, device=X0.device)
        return R1(t) @ X0 @ R2(t).mT

    Y, eps = at(0), 0.0
    for k in range(steps):
        increment = at(k + 1) - at(k)
        Y = retracted(Y, tangent(best(Y, r), increment), r, retraction)
        eps = largest((eps, (at(k + 1) - best(at(k + 1), r).dense).norm()))
    return float((Y - at(steps)).norm()), eps


def check_without_h(sample: Sample, *, retraction: str = "factored") -> Evidence:
    """E‖Y - W‖² <= 10⁶ (ε² + hσ²) up to rounding, where ε = σ = 0."""
    distance, eps = path_in_the_manifold(sample, LADDER[-1], retraction)
    return inequality(distance**2, 1e6 * eps**2, tolerance=1e-18, detail={"ε": eps})


def figure(dtype: torch.dtype, device: torch.device):
    """Mean squared distance against h."""
    from ..plotting import COLOURS, new

    given = sample(1, dtype, device)
    rows = [train(given, steps) for steps in LADDER]
    h = [TIME / n for n in LADDER]
    y = [float(q["to W"].mean()) for q in rows]
    low, high = interval(torch.stack([q["to W"] for q in rows]), 1)
    fig, ax = new()
    ax.loglog(h, y, "o-", color=COLOURS[1], label=f"E‖Y - W‖², slope in [{low:.2f}, {high:.2f}]")
    ax.loglog(h, [y[0] * (x / h[0]) ** 2 for x in h], "--", color=COLOURS[2], label="h²")
    ax.loglog(h, [y[0] * (x / h[0]) for x in h], ":", color=COLOURS[0], label="h")
    ax.set_xticks(h, [f"1/{n}" for n in LADDER])
    ax.minorticks_off()
    ax.set(xlabel="step h", ylabel="mean squared distance at time 1")
    ax.set(title=f"Independent noise in both trainings, {SEEDS} seeds")
    ax.legend()
    return fig


CLAIM = Claim(
    id="training/noise",
    title="T5: independent noise costs hσ² in mean square",
    statement=(
        r"E\|Y_k-X_k\|^2\le\frac{e^{Akh}-1}{A}\big[(1+4h)C^2+4h\sigma^2\big],\quad "
        r"C=O(\varepsilon+h),\quad A=\max(0,2a+1+4hg^2)"
    ),
    hypotheses=(
        "noises independent, mean 0, E‖·‖² <= σ²",
        "those of T1 with constants, almost surely",
    ),
    source=Source("ours", "theory/training/noise.py"),
    sample=sample,
    check=check,
    controls=(
        Control("h² in place of h", partial(check, order=2.0)),
        Control("a thousandth of the bound", partial(check, size=1e-3)),
        Control("C (ε² + hσ²) without h²", check_without_h),
    ),
    loose={"size": 0.1},
    trials=3,
    figure=figure,
    float32="float64 only: squared distances of O(hσ²) are compared",
    kind="order",
)
