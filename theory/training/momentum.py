r"""T6: momentum. A bound for position and velocity together.

**Statement.** Let b_W⁺ = βb_W + F_k(W), W⁺ = W + hb_W⁺, and on the manifold b⁺ = βP_Y b + P_Y
F_k(Y), Y⁺ = R_Y(hb⁺): momentum is transported by the tangent projection. X, X⁺ are any points of
rank r, with X₋ the one before X, ρ = (Y⁺-Y)/h - b⁺, d = (X⁺-X)/h - P_X b_W⁺, s = max(σ_r(X),
σ_r(Y)), and ℓ_k = ‖F_k(Y) - F_k(X)‖/‖Y - X‖. If E >= e = ‖Y - X‖ and V >= v = ‖b - P_{X₋}b_W‖
before the step, then

    V⁺ = βV + (β‖P_{X₋}b_W‖/s + ‖F_k(W)‖/s + ℓ_k) E + ‖F_k(X) - F_k(W)‖ + β‖P_X P_{X₋}^⊥ b_W‖,
    E⁺ = E + h (V⁺ + ‖ρ‖ + ‖d‖)

bound v⁺ = ‖b⁺ - P_X b_W⁺‖ and e⁺ after it. With constants (‖b_W‖ <= μ/(1-β)) both stay O(ε + h) on
a fixed time: the growth rate is at most (ℓ + μ/s + βμ/((1-β)s))/(1-β).

**Proof.** The transport is T_{X→Y} = P_Y on T_X, and ‖P_Y b - b‖ = ‖(P_Y - P_X) b‖ <= ‖Y-X‖‖b‖/s
for b in T_X, by L3.3. Hence, with P_Y b - P_X b_W = P_Y(b - P_{X₋}b_W) + (P_Y - P_X) P_{X₋}b_W -
P_X P_{X₋}^⊥ b_W, the three parts of βV, of β‖P_{X₋}b_W‖E/s and of the last term; and P_Y F(Y) - P_X
F(W) = P_Y(F(Y) - F(X)) + P_Y(F(X) - F(W)) + (P_Y - P_X)F(W). Add h times the difference of the
velocities to that of the positions. P_X P_{X₋}^⊥ = (P_X - P_{X₋})P_{X₋}^⊥ is O(‖X - X₋‖/s) = O(h).
∎

Here ℓ stands where T1 has λ + κ, because the velocity is no function of the position. For the
averaged iterates it is one: ``momentum_one_sided.py`` has λ + κ.

Another transport T adds β‖Tb - P_Y b‖ to V⁺. What ``CondLR`` does is the claim ``transport``. Ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ..sampling import Draw
from ._fields import resting_twin, training, turned_pair
from ._steps import Companion, Training, best, retracted, tangent
from .discrete import compared

MEMORY = 1.0  # of βV
TRANSPORT = 1.0  # of ‖Y-X‖‖b‖/s
SOURCE = 1.0  # of ‖F(X) - F(W)‖
SPEED = 1.0  # of hV⁺


def length(Z: Tensor) -> Tensor:
    """Frobenius norm, (B,)."""
    return torch.linalg.matrix_norm(Z)


Transport = Callable[[Companion, Companion, Tensor], Tensor]


def projected(old: Companion, new: Companion, b: Tensor) -> Tensor:
    """P_Y b."""
    return tangent(new, b)


def copied(old: Companion, new: Companion, b: Tensor) -> Tensor:
    """The blocks of b with the new point's singular frames: no transport at all.

    Between nearly equal singular values these frames turn at any speed, and signs flip. For r = 1,
    or well separated values, they move as little as the point does, and copying costs O(h) as
    projecting does: no error to find.
    """
    M = old.U.mT @ b @ old.V
    U_p = b @ old.V - old.U @ M
    V_p = b.mT @ old.U - old.V @ M.mT
    return new.U @ M @ new.V.mT + U_p @ new.V.mT + new.U @ V_p.mT


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, torch.float64, device)
    beta = draw.choose(0.5, 0.9)
    options = {"h": draw.choose(0.01, 0.05), "steps": 15, "family": "regression", **fixed}
    return {"training": training(seed, device, **options), "beta": beta}


def resting(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    return {"training": resting_twin(seed, device, h=0.05, steps=4), "beta": 0.5}


def turned(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A constant normal force: P_Y turns it by as much as L3.3 allows, and X rests."""
    return {"training": turned_pair(seed, device, h=1e-2, steps=20), "beta": 0.5}


def run(at: Training, beta: float, transport: Transport = projected) -> list[dict[str, Tensor]]:
    """Position and velocity of both, and the theorem's terms, step by step; one layer."""
    (W,), (r,), h = at.start, at.ranks, at.h
    X = best(W, r)
    Y = X.dense if at.low_rank_start is None else at.low_rank_start[0]
    b_W, b, before, at_Y = torch.zeros_like(W), torch.zeros_like(W), X, best(Y, r)
    rows = []
    for k in range(at.steps):
        new_Y = best(Y, r)
        FW, FX, FY = (at.field(k, (Z,))[0] for Z in (W, X.dense, Y))
        kept = tangent(before, b_W)  # P_{X₋} b_W
        e, v = length(Y - X.dense), length(b - kept)
        lost = length(tangent(X, b_W - kept))
        b = beta * transport(at_Y, new_Y, b) + tangent(new_Y, FY)
        b_W = beta * b_W + FW
        next_W, next_Y = W + h * b_W, retracted(Y, h * b, r, at.retraction)
        next_X = best(next_W, r)
        s = torch.maximum(X.s[..., -1], new_Y.s[..., -1])
        rows.append(
            {
                "e": e,
                "v": v,
                "next e": length(next_Y - next_X.dense),
                "next v": length(b - tangent(X, b_W)),
                "memory": length(kept) / s,
                "force": length(FW) / s,
                "lipschitz": length(FY - FX) / e.clamp_min(1e-150),
                "source": length(FX - FW),
                "lost": lost,
                "rho": length(next_Y - Y - h * b) / h,
                "d": length(next_X.dense - X.dense - h * tangent(X, b_W)) / h,
            }
        )
        W, Y, before, X, at_Y = next_W, next_Y, X, next_X, new_Y
    return rows


def check(
    sample: Sample,
    *,
    memory: float = MEMORY,
    transport: float = TRANSPORT,
    source: float = SOURCE,
    speed: float = SPEED,
    by: Transport = projected,
) -> Evidence:
    at, beta = sample["training"], sample["beta"]
    rows = run(at, beta, by)
    E, V = rows[0]["e"], rows[0]["v"]
    measured, bounds = [], []
    for q in rows:
        turning = transport * (beta * q["memory"] + q["force"])
        V = memory * beta * V + (turning + q["lipschitz"]) * E + source * q["source"]
        V = V + beta * q["lost"]
        E = E + speed * at.h * (V + q["rho"] + q["d"])
        measured += [q["next e"], q["next v"]]
        bounds += [E, V]
    return compared(torch.stack(measured), torch.stack(bounds), β=beta, h=at.h)


def figure(dtype: torch.dtype, device: torch.device):
    """Distance of positions and of velocities, with their bounds, for both transports."""
    from ..plotting import COLOURS, new

    given = sample(3, dtype, device, h=0.05, steps=25, m=8, n=6, rank=2, retraction="factored")
    fig, axes = new(2, width=5.0)
    at, beta = given["training"], given["beta"]
    for k, (name, by) in enumerate((("transported", projected), ("copied", copied))):
        rows = run(at, beta, by)
        steps = range(1, len(rows) + 1)
        for ax, key in zip(axes, ("next e", "next v"), strict=True):
            y = [float(q[key][0]) for q in rows]
            ax.semilogy(steps, y, color=COLOURS[k + 1], label=f"momentum {name}")
    E, V = rows[0]["e"], rows[0]["v"]
    bounds = []
    for q in run(at, beta):
        V = beta * V + (beta * q["memory"] + q["force"] + q["lipschitz"]) * E + q["source"]
        V = V + beta * q["lost"]
        E = E + at.h * (V + q["rho"] + q["d"])
        bounds.append((float(E[0]), float(V[0])))
    for ax, limits in zip(axes, zip(*bounds, strict=True), strict=True):
        ax.semilogy(range(1, len(limits) + 1), limits, "--", color=COLOURS[0], label="T6")
        ax.set(xlabel="step")
        ax.legend()
    axes[0].set(title=f"positions, β = {beta:g}", ylabel="‖Y - X‖")
    axes[1].set(title="velocities", ylabel="‖b - P_X b_W‖")
    return fig


CLAIM = Claim(
    id="training/momentum",
    title="T6: momentum, position and velocity together",
    statement=(
        r"V^+=\beta V+\Big(\frac{\beta\|P_{X_-}b_W\|+\|F_k(W)\|}{s}+\ell_k\Big)E+\|F_k(X)-F_k(W)\|"
        r"+\beta\|P_XP_{X_-}^\perp b_W\|,\quad E^+=E+h(V^++\|\rho\|+\|d\|)"
    ),
    hypotheses=("b transported by the tangent projection", "X, X⁺, Y, Y⁺ of rank r"),
    source=Source("ours", "theory/training/momentum.py"),
    sample=sample,
    check=check,
    extremal=(Extremal(resting), Extremal(turned)),
    controls=(
        Control("0.9 of ‖F(X) - F(W)‖", partial(check, source=0.9 * SOURCE), resting),
        Control("0.9 of hV", partial(check, speed=0.9 * SPEED), resting),
        Control("0.9 of ‖Y-X‖‖F‖/s", partial(check, transport=0.9 * TRANSPORT), turned),
        Control(
            "momentum copied with frames that turn, not transported",
            partial(check, by=copied),
            partial(sample, h=0.01, noise=1e-3, change=0.3, rank=2, spread=1.02),
        ),
    ),
    trials=12,
    figure=figure,
    float32="float64 only: differences of steps are compared",
)
