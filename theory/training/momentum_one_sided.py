r"""T6 with a one-sided constant: momentum grows errors like gradient steps of length h/(1-β).

**Statement.** With the trainings, X, d, ρ of T6 (``momentum.py``), a = P_{X₋}b_W the velocity of X,
η = h/(1-β), and

    z = (Y - X) + ηβ (b - a),    q = ηβ‖b - a‖,    so that |‖z‖ - ‖Y - X‖| <= q,

let λ_k be the one-sided quotient of F_k on [Y, X] and

    κ_k = ½ (‖P_Y^⊥(F_k(Y) + βb)‖₂/σ_r(Y) + ‖P_X^⊥(F_k(W) + βa)‖₂/σ_r(X)),
    c = ‖F_k(X) - F_k(W)‖ + β‖P_X P_{X₋}^⊥ b_W‖ + (1-β)(‖ρ‖ + ‖d‖),
    G = ‖P_Y F_k(Y) - βP_Y^⊥b - P_X F_k(W) + βP_X^⊥a - βP_X P_{X₋}^⊥ b_W‖,
    D = ηG + h(‖ρ‖ + ‖d‖),    m = max(λ_k + κ_k, -1/(2η)).

If Z >= ‖z‖ before the step, then after it Z⁺ >= ‖z⁺‖ with

    Z⁺² = Z² + 2ηm e_*² + 2ηc(Z + q) + 2qD + D²,    e_* = Z + q if m >= 0, else max(0, Z - q),

and ‖Y⁺ - X⁺‖ <= Z⁺ + q⁺. **No Lipschitz constant ℓ enters the growth.** By T6, ‖b - a‖ = O(ε + h +
E), so q = O(h)(ε + h + E): with constants ‖Y - X‖ stays O(ε + h), at the growth rate (λ +
κ)/(1-β) + O(h), where T6 alone has (ℓ + μ/s + ...)/(1-β).

**Proof.** The averaged iterates y + ηβb of heavy ball make plain gradient steps of length η; so it
is here up to normal vectors. From b⁺ = βP_Y b + P_Y F(Y) = βb - βP_Y^⊥b + P_Y F(Y) and Y⁺ = Y + hb⁺
+ hρ, with h + ηβ = η,

    (Y⁺ + ηβb⁺) - (Y + ηβb) = η (P_Y F(Y) - βP_Y^⊥b) + hρ,

and in the same way, as P_X b_W = a - P_X^⊥a + P_X P_{X₋}^⊥ b_W,

    (X⁺ + ηβa⁺) - (X + ηβa) = η (P_X F(W) - βP_X^⊥a + βP_X P_{X₋}^⊥ b_W) + hd.

P_Y^⊥b and P_X^⊥a are *normal* at Y and X: what the transport cuts off only bends, and L3.4 bounds
it together with the normal forces. So ⟨Y - X, z⁺ - z⟩ <= η(λ + κ)e² + ηce as in T1, while z - (Y -
X) has norm q and ‖z⁺ - z‖ <= D. Expand ‖z⁺‖². e differs from ‖z‖ by q at most, and the right-hand
side is not decreasing in ‖z‖ because 1 + 2ηm >= 0. ∎

**Sharp** in κ (a turned pair), in c (a resting low-rank model) and in q (a pair that comes back),
up to O(h). Ours; averaged iterates are the classical tool for heavy ball without a manifold.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..approximation.extremal import Corner
from ..approximation.flows import spectral_norm
from ..approximation.problems import Layers
from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ..sampling import Draw
from . import momentum
from ._fields import resting_twin, training, turned_pair
from ._steps import Training, best, retracted, tangent
from .discrete import compared
from .momentum import length

CURVATURE = 1.0  # of κ
SOURCE = 1.0  # of c
LAG = 1.0  # of q


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Minibatch regression, and full gradients with λ = -1."""
    draw = Draw(seed, torch.float64, device)
    beta, h = draw.choose(0.5, 0.9), draw.choose(0.01, 0.05)
    family = draw.choose("regression", "attraction")
    options = {"h": h, "steps": 20, "family": family, **fixed}
    return {"training": training(seed, device, **options), "beta": beta}


def resting(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    return {"training": resting_twin(seed, device, h=2e-3, steps=500), "beta": 0.2}


def turned(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    return {"training": turned_pair(seed, device, h=1e-3, steps=300, theta=1e-3), "beta": 0.5}


def returning(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """W rests at a minimum of ½‖W - X₀‖², and a turned Y comes back: z lags behind Y - X."""
    at = Corner(seed, device)
    U, S, V = at.turned(1e-3)

    def field(k: int, W: Layers) -> Layers:
        return (at.X - W[0],)

    start = (U @ S @ V.mT,)
    pair = Training("returning pair", field, (at.X,), (at.rank,), 0.02, 4, low_rank_start=start)
    return {"training": pair, "beta": 0.5}


def cut(at: Tensor, kept: Tensor, Z: Tensor, r: int) -> Tensor:
    """‖P^⊥ Z‖₂/σ_r at a point, given P Z."""
    return spectral_norm(Z - kept) / torch.linalg.svdvals(at)[..., r - 1]


def run(at: Training, beta: float) -> list[dict[str, Tensor]]:
    """The theorem's terms step by step, (B,) each; one layer."""
    (W,), (r,), h = at.start, at.ranks, at.h
    X = best(W, r)
    Y = X.dense if at.low_rank_start is None else at.low_rank_start[0]
    b_W, b, a = (torch.zeros_like(W) for _ in range(3))
    rows = []
    for k in range(at.steps):
        on_Y = best(Y, r)
        FW, FX, FY = (at.field(k, (Z,))[0] for Z in (W, X.dense, Y))
        gap = Y - X.dense
        e = length(gap)
        # On X: what b_W has outside of the last tangent space is lost, not cut.
        lost = tangent(X, b_W - a)
        push_Y, push_X = FY + beta * b, FW + beta * a
        go_Y, go_X = tangent(on_Y, push_Y) - beta * b, tangent(X, push_X) - beta * a
        kappa = 0.5 * (
            cut(Y, tangent(on_Y, push_Y), push_Y, r) + cut(X.dense, tangent(X, push_X), push_X, r)
        )
        new_b, b_W = tangent(on_Y, push_Y), beta * b_W + FW
        new_a = tangent(X, b_W)
        next_W, next_Y = W + h * b_W, retracted(Y, h * new_b, r, at.retraction)
        next_X = best(next_W, r)
        rows.append(
            {
                "e": e,
                "next e": length(next_Y - next_X.dense),
                "z": length(gap + h * beta / (1.0 - beta) * (b - a)),
                "lag": h * beta / (1.0 - beta) * length(b - a),
                "next lag": h * beta / (1.0 - beta) * length(new_b - new_a),
                "one_sided": (gap * (FY - FX)).sum((-2, -1)) / e.square().clamp_min(1e-300),
                "kappa": kappa,
                "source": length(FX - FW) + beta * length(lost),
                "G": length(go_Y - go_X - beta * lost),
                "off": length(next_Y - Y - h * new_b) / h
                + length(next_X.dense - X.dense - h * new_a) / h,
            }
        )
        W, Y, X, b, a = next_W, next_Y, next_X, new_b, new_a
    return rows


def bounds(
    at: Training,
    beta: float,
    rows: list[dict[str, Tensor]],
    *,
    curvature: float = CURVATURE,
    source: float = SOURCE,
    lag: float = LAG,
) -> Tensor:
    """Z⁺ + q⁺ after each step, (steps, B)."""
    eta, Z = at.h / (1.0 - beta), rows[0]["z"]
    found = []
    for row in rows:
        q, c = lag * row["lag"], source * (row["source"] + (1.0 - beta) * row["off"])
        D = eta * row["G"] + at.h * row["off"]
        m = (row["one_sided"] + curvature * row["kappa"]).clamp_min(-0.5 / eta)
        near = torch.where(m >= 0.0, Z + q, (Z - q).clamp_min(0.0))
        squared = Z.square() + 2.0 * eta * (m * near.square() + c * (Z + q)) + 2.0 * q * D + D * D
        Z = squared.clamp_min(0.0).sqrt()
        found.append(Z + lag * row["next lag"])
    return torch.stack(found)


def check(
    sample: Sample,
    *,
    curvature: float = CURVATURE,
    source: float = SOURCE,
    lag: float = LAG,
) -> Evidence:
    at, beta = sample["training"], sample["beta"]
    rows = run(at, beta)
    E = bounds(at, beta, rows, curvature=curvature, source=source, lag=lag)
    detail = {"field": at.name, "β": beta, "h": at.h, "retraction": at.retraction}
    return compared(torch.stack([row["next e"] for row in rows]), E, **detail)


def figure(dtype: torch.dtype, device: torch.device):
    """Errors under contraction, λ = -1, with the bounds of both forms of T6."""
    from ..plotting import COLOURS, new

    options: dict = {"m": 8, "n": 6, "rank": 2, "noise": 0.02, "change": 0.5, "spread": 2.0}
    fig, axes = new(2, width=5.0)
    for ax, beta in zip(axes, (0.5, 0.9), strict=True):
        at = training(
            3, device, family="attraction", h=0.02, steps=150, retraction="svd", **options
        )
        rows, old = run(at, beta), momentum.run(at, beta)
        E, V = old[0]["e"], old[0]["v"]
        first = []
        for p in old:
            V = beta * V + (beta * p["memory"] + p["force"] + p["lipschitz"]) * E + p["source"]
            V = V + beta * p["lost"]
            E = E + at.h * (V + p["rho"] + p["d"])
            first.append(float(E[0]))
        k = range(1, at.steps + 1)
        second = bounds(at, beta, rows)[:, 0].cpu()
        ax.semilogy(k, first, "--", color=COLOURS[2], label="T6, with ℓ")
        ax.semilogy(k, second, "--", color=COLOURS[0], label="T6, with λ + κ")
        measured = [float(row["next e"][0]) for row in rows]
        ax.semilogy(k, measured, color=COLOURS[1], label="‖Y - X‖")
        ax.set(xlabel="step", title=f"½‖W - T‖², h = 0.02, β = {beta:g}")
        ax.legend()
    axes[0].set(ylabel="distance, Frobenius norm")
    return fig


CLAIM = Claim(
    id="training/momentum-one-sided",
    title="T6 with λ + κ: momentum as gradient steps of length h/(1-β)",
    statement=(
        r"\|Y^+-X^+\|\le Z^++q^+,\quad "
        r"(Z^+)^2=Z^2+2\eta(\lambda_k+\kappa_k)e_*^2+2\eta c(Z+q)+2qD+D^2,\quad "
        r"\eta=\frac{h}{1-\beta},\ q=\eta\beta\|b-P_{X_-}b_W\|"
    ),
    hypotheses=("b transported by the tangent projection", "X, X⁺, Y, Y⁺ of rank r"),
    source=Source("ours", "theory/training/momentum_one_sided.py"),
    sample=sample,
    check=check,
    extremal=tuple(map(Extremal, (resting, turned, returning))),
    controls=(
        Control("0.9 of κ", partial(check, curvature=0.9 * CURVATURE), turned),
        Control("0.9 of c", partial(check, source=0.9 * SOURCE), resting),
        Control("as if the iterates were their averages", partial(check, lag=0.0), returning),
    ),
    trials=16,
    figure=figure,
    float32="float64 only: differences of steps are compared",
)
