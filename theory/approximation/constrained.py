r"""Theorem B: the constrained flow stays within O(√ε), whatever the constraint does.

**Statement.** Let K = K_τ, Ẇ = F(W), Ẏ = P_{T_K(Y)}F(Y), so F(Y) = Ẏ + N_Y with N_Y normal to K at
Y. Let X(t) ∈ K be arbitrary with ‖W - X‖ <= ε; neither smooth nor nearest. Then d = ‖Y - W‖
fulfils

    (d²)' <= 2λd² + 2c ‖N_Y‖ (d + ε)²/σ_r(Y) + 2ε ‖N_Y‖,    c = ½ sqrt((1 + 2p)/(1 + p)),

p = (r-1)(1+τ)². Hence with ν = sup ‖N_Y‖, s = inf σ_r(Y), ω = 2λ + 4cν/s

    d(t) <= sqrt(d(0)² e^{ωt} + 2νε (1 + 2cε/s)(e^{ωt} - 1)/ω) = O(√ε).

**Proof.** ½(d²)' = ⟨Y-W, F(Y)-F(W)⟩ + ⟨X-Y, N_Y⟩ + ⟨W-X, N_Y⟩; L4.3 for the second term with its
sharp constant (see ``constrained_flow.py``; mathematics 4.2 has 1/√2, the limit for large r or τ);
then (d + ε)² <= 2d² + 2ε². ∎

Both forms are checked: the differential one with λ, N_Y, ε measured at every time, and the closed
one with their suprema. The rate √ε is what the proof gives; where the largest and smallest
singular values are simple, ``constrained_linear.py`` has O(ε). mathematics 4.2 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ._constrained_paths import TAUS, run, sample
from ._evidence import along_paths
from .a_priori import growth
from .constrained_flow import reach_constant
from .extremal import sharp_reach

DRIFT = 1.0  # of 2ε‖N_Y‖
REACH = 1.0  # factor of the sharp c


def check(sample: Sample, *, drift: float = DRIFT, reach: float = REACH) -> Evidence:
    at, tau = sample["problem"], sample["tau"]
    q, met, moved = run(sample, drift=drift, reach=reach)
    c, t = reach * reach_constant(at.rank, tau), q["t"]
    eps, nu, s = q["eps"].amax(0), q["nu"].amax(0), q["s_Y"].amin(0)
    omega = 2.0 * q["lam_W"].amax(0) + 4.0 * c * nu / s
    source = drift * 2.0 * nu * eps * (1.0 + 2.0 * c * eps / s)
    closed = (q["d"][0].square() * (omega * t).exp() + source * growth(omega, t)).sqrt()
    detail: dict = {"problem": at.name, "τ": tau, "share of time active": float(q["active"].mean())}
    if bool(met.any()):
        detail["closed form, largest ratio"] = float((q["d"] / closed)[:, met].max())
    # The closed form follows from the other one: the smaller bound is the one to violate.
    bound = torch.minimum(q["B"], closed)
    return along_paths(q["d"], bound, met, moved=moved, reason="not resolved", detail=detail)


def turned_at_the_bound(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A wide turn for a short time: d grows at the rate 2c‖N_Y‖/σ_r(Y) while ε is still small."""
    return sharp_reach(seed, dtype, device, theta=0.3, horizon=3e-3)


def figure(dtype: torch.dtype, device: torch.device):
    """Distance to the full flow and its certificate, for three τ."""
    from ..plotting import COLOURS, new

    fig, axes = new(3, width=4.2, sharey=True)
    for ax, tau in zip(axes, TAUS, strict=True):
        options: dict = {"rank": 3, "m": 10, "n": 8, "change": 0.8, "noise": 0.02}
        options["families"] = ("completion",)
        at = sample(48, dtype, device, tau=tau, horizon=1.5, spread=1.0 + tau, **options)
        q, _, _ = run(at)
        t, d, B, eps = (q[key][:, 0].cpu() for key in ("t", "d", "B", "eps"))
        on = q["active"][:, 0].cpu() > 0.5
        ax.fill_between(t, 0 * t, B, color=COLOURS[6], alpha=0.35, label="certificate of theorem B")
        ax.plot(t, d, color=COLOURS[1], label="‖Y - W‖: constrained to full")
        ax.plot(t, eps, "--", color=COLOURS[0], label="ε = ‖W - Π_K W‖")
        low = torch.where(on, 0.0 * t, torch.nan)
        bar = {"linewidth": 7, "solid_capstyle": "butt"}
        ax.plot(t, low, color=COLOURS[2], label="constraint active", **bar)
        ax.set(xlabel="time t", title=f"τ = {tau:g}, cond(Y) <= {1 + tau:g}", xlim=(0, 1.5))
    axes[0].set(ylabel="distance, Frobenius norm", ylim=(0, None))
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4)
    return fig


CLAIM = Claim(
    id="approximation/constrained",
    title="Theorem B: the well-conditioned flow within O(√ε)",
    statement=(
        r"(d^2)'\le2\lambda d^2+\frac{2c\|N_Y\|(d+\varepsilon)^2}{\sigma_r(Y)}+2\varepsilon\|N_Y\|,"
        r"\quad c=\tfrac12\sqrt{\tfrac{1+2p}{1+p}},\ p=(r-1)(1+\tau)^2"
    ),
    hypotheses=("Ẏ = P_{T_K(Y)} F(Y), K = K_τ", "X(t) in K_τ, ‖W - X‖ <= ε", "τ in {0, 0.1, 1}"),
    source=Source("ours", "mathematics 4.2, theorem B, with the sharp c"),
    sample=sample,
    check=check,
    controls=(
        Control("0.9 of c", partial(check, reach=0.9 * REACH), turned_at_the_bound),
        Control(
            "no drift: K as if it were W's home",
            partial(check, drift=0.0),
            partial(sample, families=("quadratic",), tau=0.0, spread=2.5, horizon=6.0),
        ),
    ),
    extremal=(Extremal(turned_at_the_bound),),
    trials=9,
    figure=figure,
    float32="float64 only: P_{T_K} is a difference quotient with step 10⁻⁶",
)
