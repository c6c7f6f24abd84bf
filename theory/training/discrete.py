r"""T1: finite steps, minibatches, any retraction. A bound that holds step by step.

**Statement.** Let W⁺ = W + hF_k(W) and Y⁺ = R_Y(hP_Y F_k(Y)), with any fields F_k (the gradient of
the minibatch of step k, the same for both), any h > 0 and any retraction R. Let X, X⁺ be any points
of rank r, and e = ‖Y - X‖. With

    d = (X⁺-X)/h - P_X F_k(W),   ρ = (Y⁺-Y)/h - P_Y F_k(Y),   c = ‖F_k(X)-F_k(W)‖ + ‖d‖ + ‖ρ‖,
    G = ‖P_Y F_k(Y) - P_X F_k(W)‖,   λ_k = ⟨Y-X, F_k(Y)-F_k(X)⟩/e²,
    κ_k = ½ (‖P_Y^⊥F_k(Y)‖₂/σ_r(Y) + ‖P_X^⊥F_k(W)‖₂/σ_r(X))

and any E >= e, the error after the step is at most

    **E⁺² = max(0, 1 + 2h(λ_k + κ_k)) E² + 2hcE + h² (G + ‖d‖ + ‖ρ‖)².**

For several layers: the product metric, κ_k the largest over the layers. No expectation, no
smallness of h, no gap behind σ_r(W), and nothing is assumed of how W and Y move: momentum, decay or
rounding enlarge d and ρ, and the bound stays one.

**Proof.** Y⁺ - X⁺ = (Y-X) + hΔ, Δ = P_Y F(Y) - P_X F(W) + ρ - d. Expand the square:

    e⁺² = e² + 2h⟨Y-X, Δ⟩ + h²‖Δ‖²,
    ⟨Y-X, P_Y F(Y) - P_X F(W)⟩ = ⟨Y-X, F(Y)-F(X)⟩ + ⟨Y-X, F(X)-F(W)⟩
                                 + ⟨X-Y, P_Y^⊥F(Y)⟩ + ⟨Y-X, P_X^⊥F(W)⟩.

The last two are at most ‖N‖₂e²/(2σ_r) each, by the prox-regularity L3.4 at Y and at X. So e⁺² <=
(1 + 2h(λ+κ)) e² + 2hce + h²(G+‖d‖+‖ρ‖)². Where the first factor is negative, 0 is an upper bound
of the first term; then the right side grows with e, and E >= e may take its place. ∎

**Sharp**: every constant is attained. Y rests and X moves by hε a step (E⁺ = E + hc: the 2 of 2hcE
and the h² term); a turned singular pair under a normal force grows by the rate κ (the ½ of κ).

Theorem A is the limit h → 0, but holds only under hypotheses on all of [0, t]; this one carries
its own evidence. It is what ``lrmanifold.monitor`` computes. Ours.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ._fields import resting_twin, training, turned_pair
from ._steps import Training, run

CURVATURE = 0.5  # of L3.4, in κ
GROWTH = 2.0  # of h(λ + κ)
CROSS = 2.0  # of hcE
SQUARE = 1.0  # of h²(G + ‖d‖ + ‖ρ‖)²
ROUNDING = 1e-11


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return {"training": training(seed, device, **fixed)}


def resting(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return {"training": resting_twin(seed, device, **fixed)}


def turned(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return {"training": turned_pair(seed, device, **fixed)}


def certificate(
    at: Training,
    *,
    curvature: float = CURVATURE,
    growth: float = GROWTH,
    cross: float = CROSS,
    square: float = SQUARE,
    floor: bool = True,
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Measured errors and certificates after each step, (steps, B); and what was measured."""
    h, rows = at.h, run(at)
    E = rows[0]["e"]
    measured, bounds = [], []
    for q in rows:
        factor = 1.0 + growth * h * (q["one_sided"] + curvature * q["bend"])
        factor = factor.clamp_min(0.0) if floor else factor
        both = q["d"] + q["rho"]
        squared = factor * E.square() + cross * h * (q["ell_eps"] + both) * E
        squared = squared + square * h * h * (q["G"] + both).square()
        E = squared.clamp_min(0.0).sqrt()
        measured.append(q["next"])
        bounds.append(E)
    return torch.stack(measured), torch.stack(bounds), rows


def compared(measured: Tensor, bound: Tensor, **detail) -> Evidence:
    """Evidence over all steps and problems, at the place of the largest ratio."""
    holds = bool((measured <= bound * (1.0 + 1e-9) + ROUNDING).all())
    ratio = torch.where(measured <= ROUNDING, 0.0 * bound, measured / bound.clamp_min(1e-300))
    place = int(ratio.argmax())
    return Evidence(
        float(measured.reshape(-1)[place]),
        float(bound.reshape(-1)[place]),
        holds,
        True,
        measured.shape[-1],
        detail,
        tuple(ratio.reshape(-1).tolist()),
    )


def check(
    sample: Sample,
    *,
    curvature: float = CURVATURE,
    growth: float = GROWTH,
    cross: float = CROSS,
    square: float = SQUARE,
    floor: bool = True,
) -> Evidence:
    at: Training = sample["training"]
    options = {"curvature": curvature, "growth": growth, "cross": cross, "square": square}
    e, E, _ = certificate(at, floor=floor, **options)
    return compared(e, E, field=at.name, h=at.h, retraction=at.retraction)


def figure(dtype: torch.dtype, device: torch.device):
    """Error and certificate step by step: two step sizes by minibatches, one by full gradients."""
    from ..plotting import COLOURS, new

    fig, axes = new(3, width=4.2)
    shown = (("regression", 0.01, 60), ("regression", 0.1, 40), ("attraction", 1.5, 12))
    for ax, (family, h, steps) in zip(axes, shown, strict=True):
        options: dict = {"m": 8, "n": 6, "rank": 2, "noise": 0.02, "change": 0.5, "spread": 2.0}
        at = training(7, device, family=family, h=h, steps=steps, retraction="factored", **options)
        e, E, rows = certificate(at)
        eps = torch.stack([q["eps"] for q in rows])[:, 0].cpu()
        k = torch.arange(1, steps + 1)
        ax.fill_between(k, 0.0 * k, E[:, 0].cpu(), color=COLOURS[6], alpha=0.35, label="T1: E")
        ax.plot(k, e[:, 0].cpu(), color=COLOURS[1], label="e = ‖Y - X‖")
        ax.plot(k, eps, "--", color=COLOURS[0], label="ε = ‖W - X‖: best possible")
        what = "batches of 8" if family == "regression" else "full gradients"
        ax.set(xlabel="step k", title=f"{what}, h = {h:g}", ylim=(0, None), xlim=(1, steps))
    axes[0].set_ylabel("distance, Frobenius norm")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3)
    return fig


CLAIM = Claim(
    id="training/discrete",
    title="T1: a bound for finite steps and minibatches, step by step",
    statement=(r"\|Y^+-X^+\|^2\le\max(0,1+2h(\lambda_k+\kappa_k))E^2+2hcE+h^2(G+\|d\|+\|\rho\|)^2"),
    hypotheses=("‖Y - X‖ <= E", "X, X⁺, Y, Y⁺ of rank r", "any h, any fields F_k"),
    source=Source("ours", "theory/training/discrete.py; mathematics 9"),
    sample=sample,
    check=check,
    extremal=(Extremal(resting), Extremal(turned)),
    controls=(
        Control("0.9 of the ½ in κ", partial(check, curvature=0.9 * CURVATURE), turned),
        Control("0.9 of 2hcE", partial(check, cross=0.9 * CROSS), resting),
        Control("no h² term", partial(check, square=0.0), resting),
        Control(
            "without the max with 0",
            partial(check, floor=False),
            partial(sample, family="regression", h=0.3),
        ),
    ),
    trials=24,
    figure=figure,
    float32="float64 only: differences of steps are compared",
)
