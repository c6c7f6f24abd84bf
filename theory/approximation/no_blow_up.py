r"""Theorem E: curvature costs no exponential factor when ε is small.

**Statement.** Under the hypotheses of theorem A with constants, and 2ε < s, let
ρ = (1 - 2ε/s)^{-½} and let g solve the Riccati equation, g(0) = 0,

    g' = λ̄ g + ρ² A g + ρ³ B g² + ρ S,    λ̄ = ρ²λ for λ >= 0, λ/(1 + 2ε/s) for λ < 0,
    S = ε [ℓ + μ/s + (ε/s)(ℓ + μ/(s - ε))],  A = (ε/s)(3ℓ/2 + μ/s),  B = ℓ/(2s) + μ/(2s(s - ε)).

Then for Y(0) = X(0), as long as g is finite, **‖Y - X‖ <= ρ g**. Since A = O(ε) and g = O(ε),

    ‖Y - W‖ <= ε [1 + (ℓ + μ/s)(e^{λt} - 1)/λ] + O(ε²)    on every fixed [0, T].

The exponent is λ, not λ + μ/s. On a prescribed path the error grows *linearly*, ε (1 + μt/s) +
O(ε²), where theorem A and Koch and Lubich have e^{μt/s} and e^{8μt/s}; for m-strongly convex
losses any m > 0 gives a bound for all times, ε [1 + (ℓ + μ/s)/m] + O(ε²), without m > μ/s.

**Proof.** Let R = W - X, normal at X, N_Y = P_Y^⊥F(Y), Q = P_Y^⊥(X - Y). From Ẋ = F(W) - R',

    ½ (e²)' = ⟨Y-X, F(Y)-F(X)⟩ + ⟨Y-X, F(X)-F(W)⟩ + ⟨Q, F(Y)⟩ + ⟨Y-X, R'⟩.

In theorem A the last two are estimated by force times curvature. But the force normal to M_r is
that of R', the derivative of something that stays below ε: integrate by parts. In the third term
write F(Y) = (F(Y) - F(W)) + Ẋ + R'. Because (Y-X) + Q = P_Y(Y-X), the two parts with R' add up to

    ⟨P_Y(Y-X), R'⟩ = d/dt ⟨Y-X, P_Y R⟩ + ⟨Ẋ-Ẏ, P_Y R⟩ + ⟨Ṗ_Y(X-Y), R⟩.

So G = ½e² - ⟨Y-X, P_Y R⟩ fulfils

    G' = ⟨Y-X, F(Y)-F(X)⟩ + ⟨Y-X, F(X)-F(W)⟩ + ⟨Q, F(Y)-F(W)⟩ + ⟨Q, Ẋ⟩ + ⟨Ẋ-Ẏ, P_Y R⟩
         + ⟨Ṗ_Y(X-Y), R⟩.

Now ‖P_X - P_Y‖ <= e/s (L3.3), hence ‖P_Y R‖ = ‖(P_Y - P_X)R‖ <= εe/s and ‖Ṗ_Y‖ <= ‖Ẏ‖/s; ‖Q‖ <=
e²/(2s) (C3.5); ⟨Q, Ẋ⟩ = ⟨Q, (P_X - P_Y)Ẋ⟩; ‖Ẋ‖ <= μs/(s - ε); ‖Ẋ - Ẏ‖ <= μe/s + ℓ(e + ε) + με/(s -
ε). So G' <= λe² + Se + Ae² + Be³, and |2G - e²| <= (2ε/s)e². With g = sqrt(2G): e <= ρg. ∎

It does not contradict the example in which e^{μt/s} is attained: there ε = μt. The source S is
sharp (control). Ours; not in the mathematics yet.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ..paths import Rotation
from ..sampling import Draw
from ._evidence import along_paths, below
from .a_priori import growth, measured
from .a_priori import sample as draw_problem
from .extremal import constant_defect
from .flows import GRID, Measured
from .problems import Batch, Layers, Problem

SOURCE = 1.0  # of S
LINEAR = 1.0  # of A
QUADRATIC = 1.0  # of B
SHARE = 0.5  # ε < s/2
TURNS = "turning path"


def sample(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    family: str | None = None,
    noise: float | None = None,
    **fixed,
) -> Sample:
    """Every second sample a long turning path; else a problem of theorem A near M_r."""
    draw = Draw(seed, torch.float64, device)
    drawn = draw.log_uniform(1e-5, 1e-3)
    noise = drawn if noise is None else noise
    names = (TURNS, "quadratic", TURNS, "completion", TURNS, "prescribed path")
    family = names[seed % len(names)] if family is None else family
    if family != TURNS:
        options = {"families": (family,), "change": 0.05, "noise": noise, **fixed}
        return draw_problem(seed, dtype, device, **options)
    return {"problem": turning(seed, device, noise=noise, horizon=draw.uniform(2.0, 8.0), **fixed)}


def turning(seed: int, device: torch.device, *, noise: float, horizon: float) -> Problem:
    """F = Ȧ for A(t) = R₁(t)(low rank + noise)R₂(t)ᵀ: constant ε, and λ = ℓ = 0."""
    draw = Batch(seed, device)
    m, n = draw.integer(4, 9), draw.integer(4, 9)
    r = draw.integer(1, min(m, n) - 2)
    R1, R2 = (Rotation.random(draw.normals(k, k), 1.0) for k in (m, n))
    A0 = draw.low_rank(m, n, draw.values(r, 2.0)) + noise * draw.units(m, n)

    def force(t: Tensor, W: Layers) -> Layers:
        A = R1(t) @ A0 @ R2(t).mT
        return (R1.J @ A + A @ R2.J.mT,)

    return Problem(TURNS, force, (A0,), r, horizon, 0.0, 0.0)


def riccati(
    t: Tensor, linear: Tensor, quadratic: Tensor, source: Tensor, substeps: int = 8
) -> Tensor:
    """g' = linear g + quadratic g² + source, g(0) = 0, by RK4; coefficients (times, B), held."""
    values, h = [torch.zeros_like(source[0])], (t[1] - t[0]) / substeps
    for k in range(1, len(t)):
        # The coefficients grow with t: those at the end of the step bound the step.
        a, b, c, g = linear[k], quadratic[k], source[k], values[-1]
        for _ in range(substeps):
            k1 = a * g + b * g * g + c
            k2 = a * (g + 0.5 * h * k1) + b * (g + 0.5 * h * k1).square() + c
            k3 = a * (g + 0.5 * h * k2) + b * (g + 0.5 * h * k2).square() + c
            k4 = a * (g + h * k3) + b * (g + h * k3).square() + c
            g = (g + (h / 6.0) * (k1 + 2.0 * k2 + 2.0 * k3 + k4)).clamp_max(1e6)
        values.append(g)
    return torch.stack(values)


def theorem_E(
    at: Problem,
    q: Measured,
    c: dict[str, Tensor],
    *,
    source: float = SOURCE,
    linear: float = LINEAR,
    quadratic: float = QUADRATIC,
) -> Tensor:
    """ρ g of the statement, (times, B)."""
    assert at.lipschitz is not None
    assert at.one_sided is not None
    ell, lam, s, eps, mu = at.lipschitz, at.one_sided, c["s"], c["eps"], c["mu"]
    share, gap = (eps / s).clamp_max(SHARE - 1e-6), (s - eps).clamp_min(1e-12)
    rho = (1.0 - 2.0 * share).rsqrt()
    S = source * eps * (ell + mu / s + share * (ell + mu / gap))
    A = linear * share * (1.5 * ell + mu / s)
    B = quadratic * (ell / (2.0 * s) + mu / (2.0 * s * gap))
    lam_bar = lam * rho.square() if lam >= 0.0 else lam / (1.0 + 2.0 * share)
    return rho * riccati(q["t"][:, 0], lam_bar + rho.square() * A, rho.pow(3) * B, rho * S)


def theorem_A(at: Problem, q: Measured, c: dict[str, Tensor]) -> Tensor:
    """ε b (e^{at} - 1)/a, for comparison."""
    assert at.lipschitz is not None
    assert at.one_sided is not None
    a, b = at.one_sided + c["mu"] / c["s"], at.lipschitz + c["mu"] / (c["s"] - c["eps"])
    return c["eps"] * b * growth(a, q["t"])


def check(
    sample: Sample,
    *,
    source: float = SOURCE,
    linear: float = LINEAR,
    quadratic: float = QUADRATIC,
) -> Evidence:
    at: Problem = sample["problem"]
    q, c = measured(at, 4 * GRID)
    bound = theorem_E(at, q, c, source=source, linear=linear, quadratic=quadratic)
    met = (below(c["eps"], SHARE * c["s"]) & below(q["tail"], q["s_X"])).all(0)
    met &= below(bound[-1], c["s"][-1])
    detail: dict = {"problem": at.name}
    if bool(met.any()):
        loose = theorem_A(at, q, c) / bound
        detail["μT/s, mean"] = float((c["mu"] / c["s"])[-1, met].mean() * at.horizon)
        detail["theorem A / theorem E at T, mean"] = float(loose[-1, met].mean())
    reason = "ε >= s/2, or the bound exceeds s"
    return along_paths(q["e"], bound, met, reason=reason, detail=detail)


def figure(dtype: torch.dtype, device: torch.device):
    """Error of following a turning path for a long time, with the bounds of A and E."""
    from ..plotting import COLOURS, new

    at = turning(1, device, noise=1e-4, horizon=12.0)
    q, c = measured(at, 8 * GRID)
    fig, ax = new(width=6.4)
    t = q["t"][1:, 0].cpu()
    lines = (
        (theorem_A(at, q, c), "-", COLOURS[2], r"theorem A: grows like ε $e^{\mu t/s}$"),
        (theorem_E(at, q, c), "-", COLOURS[3], "theorem E: ε μt/s + O(ε²)"),
        (q["e"], "-", COLOURS[1], "measured ‖Y - X‖"),
        (c["eps"], "--", COLOURS[0], "ε = ‖W - X‖"),
    )
    for values, style, colour, label in lines:
        ax.semilogy(t, values[1:, 0].cpu(), style, color=colour, label=label)
    turns = float((c["mu"] / c["s"])[-1, 0]) * at.horizon
    ax.set(xlabel="time t", ylabel="distance, Frobenius norm", ylim=(1e-6, 1e3))
    ax.set(title=f"Following a turning path of near-rank {at.rank}, μT/s = {turns:.0f}")
    ax.legend(loc="upper left")
    return fig


CLAIM = Claim(
    id="approximation/no-blow-up",
    title="Theorem E: no exponential factor from curvature for small ε",
    statement=(
        r"\|Y-W\|\le\varepsilon\Big[1+\big(\ell+\tfrac{\mu}{s}\big)\frac{e^{\lambda t}-1}{\lambda}"
        r"\Big]+O(\varepsilon^2)"
    ),
    hypotheses=("those of theorem A with constants", "2ε < s", "Y(0) = X(0)"),
    source=Source("ours", "theory/approximation/no_blow_up.py"),
    sample=sample,
    check=check,
    extremal=(Extremal(partial(constant_defect, tail=1e-3)),),
    controls=(
        Control(
            "0.9 of S, where it is attained",
            partial(check, source=0.9 * SOURCE),
            partial(constant_defect, tail=1e-3),
        ),
        Control("no source", partial(check, source=0.0), partial(sample, family=TURNS)),
    ),
    loose={"linear": 0, "quadratic": 0},
    trials=18,
    figure=figure,
    float32="float64 only: the comparison needs e >> rounding, and says nothing about float32",
)
