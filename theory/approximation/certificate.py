r"""Theorem A, a-posteriori: how far robust low-rank training stays from the full flow.

**Statement.** The full model trains by Ẇ = F(t, W), the low-rank model by Ẏ = P_Y F(t, Y), from
Y(0) ∈ M_r. If the full model has a good low-rank neighbour all along, the low-rank model finds it:
with X = Π_r W its best rank-r approximation, ε = ‖W - X‖ and e = ‖Y - X‖,

    e(t) <= E(t),    E' = (λ + κ) E + ℓε + δ,   E(0) = e(0),        and so    ‖Y - W‖ <= ε + E,

    κ = ½ (‖P_Y^⊥F(Y)‖₂/σ_r(Y) + ‖P_X^⊥F(W)‖₂/σ_r(X)),
    δ = σ_{r+1}(W)/(σ_r(W) - σ_{r+1}(W)) · ‖(U_p, V_p) of P_X F(W)‖.

Here every quantity is measured along the path: λ as the quotient ⟨Y-X, F(Y)-F(X)⟩/e², ℓε as
‖F(X) - F(W)‖. For several layers the metric is the product one, κ the largest over the layers.

**Hypotheses.** W(t) keeps its gap σ_r > σ_{r+1} (so X is C¹); ε < s = inf min(σ_r(X), σ_r(Y)).

**Proof.** With N = W - X and S_N the shape operator, Ẋ = (I - S_N)⁻¹P_X F(W) (L3.6). S_N vanishes
on the block M and has norm σ_{r+1}/σ_r, so Ẋ = P_X F(W) + Δ with ‖Δ‖ <= δ. With N_Y = P_Y^⊥F(Y)
and N_X = P_X^⊥F(W),

    ½ (e²)' = ⟨Y-X, F(Y)-F(X)⟩ + ⟨Y-X, F(X)-F(W)⟩ + ⟨X-Y, N_Y⟩ + ⟨Y-X, N_X⟩ - ⟨Y-X, Δ⟩
           <= λe² + ℓεe + (‖N_Y‖₂/(2σ_r(Y)) + ‖N_X‖₂/(2σ_r(X))) e² + δe,

by the prox-regularity L3.4, used once at Y and once at X. Gronwall. ∎

**Sharp in each of its three constants**: see the controls, each with the flow that attains it.
Source: mathematics 4.1 (ours; of the form of the main theorem of Savostianova et al., NeurIPS
2023). The flows are integrated by RK4, the comparison equation by a rule of order 4 (of order 2 at
kinks of κ); steps are halved until the certificate moves by less than 10⁻³ of itself, and the last
movement is the tolerance, reported in ``detail["step error"]``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ._evidence import LATE, along_paths, below, summary
from .extremal import constant_defect, sharp_exponent, sharp_lipschitz
from .flows import GRID, Measured, comparison, integrate, measure, refine
from .problems import FAMILIES, Problem, problem

CURVATURE = 0.5  # of L3.4, in κ
LIPSCHITZ = 1.0  # of ℓε
DEFECT = 1.0  # of δ
STEP_TOLERANCE = 1e-3


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return {"problem": problem(seed, device, **fixed)}


def certificate(
    at: Problem,
    *,
    curvature: float = CURVATURE,
    lipschitz: float = LIPSCHITZ,
    defect: float = DEFECT,
) -> tuple[Measured, Tensor, Tensor]:
    """Measured quantities with the certificate ``E``; met hypotheses (B,); step errors."""

    def run(steps: int) -> Measured:
        path = integrate(at, steps)
        q = dict(measure(at, path))
        rate = q["one_sided"] + curvature * q["bend"]
        source = lipschitz * q["ell_eps"] + defect * q["delta"]
        q["E"] = comparison(path.times, rate, source, q["e"][0])
        q["t"] = path.times[:, None].expand_as(q["E"])
        return q

    q, moved = refine(run, ("e", "E"), tolerance=STEP_TOLERANCE)
    s = torch.minimum(q["s_X"], q["s_Y"]).amin(0)
    met = below(q["eps"].amax(0), s) & below(q["tail"], q["s_X"]).all(0)
    met &= below(moved[GRID // 10 :], STEP_TOLERANCE).all(0)
    return q, met, moved


def check(
    sample: Sample,
    *,
    curvature: float = CURVATURE,
    lipschitz: float = LIPSCHITZ,
    defect: float = DEFECT,
) -> Evidence:
    at: Problem = sample["problem"]
    q, met, moved = certificate(at, curvature=curvature, lipschitz=lipschitz, defect=defect)
    late = slice(int(LATE * len(q["e"])), None)
    detail: dict = {"problem": at.name}
    if bool(met.any()):
        distance = (q["distance"] / (q["eps"] + q["E"]))[:, met]
        detail["‖Y-W‖ / (ε + E), all times"] = summary(distance)
        detail["‖Y-W‖ / (ε + E), after 10 %"] = summary(distance[late])
        detail["‖Y-X‖ / E, all times"] = summary((q["e"] / q["E"].clamp_min(1e-300))[1:, met])
    reason = "ε >= s, the gap closes, or the flow is not resolved"
    return along_paths(q["e"], q["E"], met, moved=moved, reason=reason, detail=detail)


def figure(dtype: torch.dtype, device: torch.device):
    """Error against certificate over time, one problem of each family."""
    from ..plotting import COLOURS, new

    fig, grid = new(2, rows=2, width=4.2, height=3.4)
    axes = grid.flat
    for k, (ax, name) in enumerate(zip(axes, FAMILIES, strict=True)):
        at = problem(
            5,
            device,
            families=(name,),
            m=10,
            n=8,
            rank=3,
            noise=0.03,
            change=0.7,
            spread=2.0,
            lowest_curvature=0.0,
        )
        q, _, _ = certificate(at)
        t, eps, E, e, d = (q[key][:, 0].cpu() for key in ("t", "eps", "E", "e", "distance"))
        ax.fill_between(t, 0 * t, eps + E, color=COLOURS[6], alpha=0.35, label="ε + E: certificate")
        ax.plot(t, d, color=COLOURS[1], label="‖Y - W‖: low-rank to full")
        ax.plot(t, eps, "--", color=COLOURS[0], label="ε = ‖W - X‖: best possible")
        ax.plot(t, e, ":", color=COLOURS[2], label="e = ‖Y - X‖: low-rank to best")
        ax.set(xlabel="time t", title=name, ylim=(0, None), xlim=(0, float(t[-1])))
        if k % 2 == 0:
            ax.set(ylabel="distance, Frobenius norm")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2)
    fig.suptitle("The low-rank flow stays inside the certificate of theorem A (10 x 8, rank 3)")
    return fig


CLAIM = Claim(
    id="approximation/certificate",
    title="Theorem A: the low-rank flow stays near the full one",
    statement=(
        r"\|Y-X\|\le E,\quad E'=(\lambda+\kappa)E+\ell\varepsilon+\delta,\quad "
        r"\kappa=\tfrac12\Big(\tfrac{\|P_Y^\perp F(Y)\|_2}{\sigma_r(Y)}"
        r"+\tfrac{\|P_X^\perp F(W)\|_2}{\sigma_r(X)}\Big)"
    ),
    hypotheses=("σ_r(W) > σ_{r+1}(W)", "‖W - X‖ < s <= σ_r(X), σ_r(Y)", "Ẇ = F(W), Ẏ = P_Y F(Y)"),
    source=Source("ours", "mathematics 4.1, theorem A, a-posteriori form"),
    sample=sample,
    check=check,
    extremal=(Extremal(sharp_exponent), Extremal(sharp_lipschitz), Extremal(constant_defect)),
    controls=(
        Control("0.9 of the ½ in κ", partial(check, curvature=0.9 * CURVATURE), sharp_exponent),
        Control("0.9 of ℓε", partial(check, lipschitz=0.9 * LIPSCHITZ), sharp_lipschitz),
        Control("0.9 of δ", partial(check, defect=0.9 * DEFECT), constant_defect),
    ),
    trials=16,
    figure=figure,
    float32="float64 only: the comparison needs e >> rounding, and says nothing about float32",
)
