r"""Theorem D: O(ε) while the constraint is active, for any number of contacts.

**Statement.** Let K = K_τ, κ = 1+τ > 1, Ẇ = F(W), Ẏ = P_{T_K(Y)}F(Y), Z = Π_r W with gap, and

    ψ(t) = max(0, max_{s <= t} σ_1(Z(s)) - κσ_r(Z(s))),    m = (u_1v_1ᵀ - κ u_rv_rᵀ)/(1 + κ²),
    Z~ = Z - ψ m.

Suppose that whenever ψ > 0, the extreme singular values are simple: σ_1 - σ_2 > ψ/(1+κ²) and
σ_{r-1} - σ_r > κψ/(1+κ²) (for r = 2 their sum). Then Z~ ∈ K, and e = ‖Y - Z~‖ fulfils

    e' <= (λ + κ_D) e + θ‖Ż‖ + δ + ‖F(W) - F(Z~)‖,
    κ_D = c‖N_Y‖/σ_r(Y) + (‖P_Z^⊥F(Z~)‖₂ + κψ'/(1+κ²))/(2σ_r(Z~)),
    θ = ψ/(1+κ²) · max(1/(σ_1-σ_2), κ/(σ_{r-1}-σ_r), (1+κ)/(σ_1-σ_r), κ/σ_r).

If ‖W - Π_K W‖ <= ε, then ψ <= sqrt(1+κ²) ε, so ‖W - Z~‖ <= √2 ε, θ, δ and ℓ‖W - Z~‖ are O(ε), and
∫κψ' <= κψ(T) = O(ε): for Y(0) = Π_K W(0), **‖Y - W‖ = O(ε)**, with constants that depend on λ, ℓ,
μ, T, σ_r and the two gaps, and not on how often the boundary is met.

**Proof.** (i) The function σ_1 - κσ_r is smooth where the extremes are simple; its gradient (1+κ²)
m depends on the singular vectors alone, which Z -> Z - ψm keeps. So σ_1(Z~) - κσ_r(Z~) = σ_1 -
κσ_r - ψ <= 0: Z~ ∈ K, with equality exactly when the running maximum is attained; m is an outward
normal there, and ψ grows there only. (ii) Z -> Z - ψm is a spectral map; its derivative differs
from the identity by (f_i-f_j)/(σ_i-σ_j) and (f_i+f_j)/(σ_i+σ_j) on the symmetric and skew parts of
the core and by f_j/σ_j on U_p, V_p, with f_1 = -ψ/(1+κ²), f_r = κψ/(1+κ²), else 0: in norm at most
θ. (iii) Hence with Ż = P_Z F(W) + Δ, ‖Δ‖ <= δ, and because Z~ has the row and column spaces of Z,

    Z~' = F(Z~) - N + ρ,   N = P_Z^⊥F(Z~) + ψ'm ∈ N_K(Z~),   ‖ρ‖ <= θ‖Ż‖ + δ + ‖F(W) - F(Z~)‖:

Z~ *is* a constrained flow, with a perturbation that is small at every time. (iv) As in theorem C,
with L4.3 at Y and at Z~. For ψ <= sqrt(1+κ²) ε: Π_K W and Z have the same singular vectors (L4.2),
so ‖Z - Π_K W‖ <= ε, and σ_1 - κσ_r is sqrt(1+κ²)-Lipschitz in the singular values. ∎

The idea is Skorokhod's: in one dimension the reflected path is W plus the running maximum of how
far W has left the set. Compare theorem C, whose defect for X = Π_K W is as large as the force at
every return of W to the set: on the paths below, which shake through the boundary T/ε times, C is
O(1) and B is O(√ε). Not covered: several largest or smallest singular values at the bound
together. For τ = 0 see ``isometries.py``. Ours; not in the mathematics yet.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ..paths import Rotation
from . import _constrained_paths
from ._constrained_paths import theorem_B, theorem_C, trapezoid
from ._evidence import along_paths, below
from .constrained_flow import ETA, ConstrainedPath, integrate, project, reach_constant
from .extremal import constant_defect, sharp_lipschitz, sharp_reach, sharp_stretch
from .flows import GRID, Measured, from_the_start, inner, norm, normal_part, refine, spectral_norm
from .problems import Batch, Layers, Problem

STRETCH = 1.0  # of θ‖Ż‖
FORCE = 1.0  # of ‖F(W) - F(Z~)‖
DEFECT = 1.0  # of δ
CURVATURE = 1.0  # of κ_D
PUSH = 1.0  # of κψ' in it
STEP_TOLERANCE = 1e-2


def sample(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    eps: float | None = None,
    attraction: float | None = None,
    speed: float = 1.0,
) -> Sample:
    """A path that turns, and shakes across the boundary of K_τ with amplitude ε and speed O(1).

    A(t) = R₁(t) [U₀ diag(σ(t)) V₀ᵀ + ε sin(ω't) N] R₂(t)ᵀ; σ(t) is on the boundary but for an
    ε sin(ωt) along its normal; ω, ω' ~ 1/ε. F(t, W) = Ȧ - attraction · (weights ∘ (W - A)).
    """
    draw = Batch(seed, device, size=4)
    r, kappa = draw.integer(2, 4), draw.choose(1.3, 2.0)
    m, n = r + draw.integer(2, 5), r + draw.integer(1, 4)
    eps = draw.log_uniform(1.5e-2, 4e-2) if eps is None else eps
    attraction = draw.choose(0.0, 1.0) if attraction is None else attraction
    U0, V0, N = draw.frames(m, r), draw.frames(n, r), draw.units(m, n)
    middle = 1.0 + (kappa - 1.0) * draw.uniforms(r, low=0.4, high=0.6)
    ends = torch.zeros(r, dtype=N.dtype, device=device)
    ends[0], ends[-1] = 1.0, -kappa
    base = middle.clone()
    base[:, 0], base[:, -1] = kappa, 1.0
    R1, R2 = (Rotation.random(draw.normals(k, k), 1.0) for k in (m, n))
    phase, omega = draw.uniforms(1, high=6.28), speed / eps
    weights = attraction * draw.uniforms(m, n)
    known: dict[float, tuple[Tensor, Tensor]] = {}  # every time is asked for by several stages

    def path(t: Tensor) -> tuple[Tensor, Tensor]:
        if t.ndim:
            return evaluate(t)
        if float(t) not in known:
            known[float(t)] = evaluate(t)
        return known[float(t)]

    def evaluate(t: Tensor) -> tuple[Tensor, Tensor]:
        wave = omega * t + phase[:, :, None]
        unit = ends / ends.norm()
        sigma = base[:, None, :] + eps * wave.sin() * unit
        rate = eps * omega * wave.cos() * unit
        noise, shake = (eps * f(1.3 * wave) for f in (torch.sin, torch.cos))
        left, right = R1(t), R2(t).mT
        A = left @ ((U0 * sigma) @ V0.mT + noise * N) @ right
        moving = (U0 * rate) @ V0.mT + (1.3 * omega * shake) * N
        return A, R1.J @ A + A @ R2.J.mT + left @ moving @ right

    def force(t: Tensor, W: Layers) -> Layers:
        A, dA = path(t)
        return (dA - weights * (W[0] - A),)

    start = path(torch.zeros((), dtype=N.dtype, device=device))[0]
    problem = Problem("shaken path", force, (start,), r, 0.6, attraction, 0.0)
    return {"problem": problem, "tau": kappa - 1.0, "eps": eps}


def measure(
    at: Problem,
    tau: float,
    path: ConstrainedPath,
    *,
    stretch: float = STRETCH,
    force: float = FORCE,
    defect: float = DEFECT,
    curvature: float = CURVATURE,
    push: float = PUSH,
) -> Measured:
    """Y against Z~ along the path: e, the certificate D, ε = ‖W - Π_K W‖, and the hypotheses."""
    r, kappa, c = at.rank, 1.0 + tau, reach_constant(at.rank, tau)
    t, h = path.times[:, None, None, None], path.times[1] - path.times[0]
    P, s, Qh = linalg.svd(path.W)
    U, V, tail = P[..., :r], Qh[..., :r, :].mT, s[..., r]
    top, low = s[..., 0], s[..., r - 1]
    psi = (top - kappa * low).cummax(0).values.clamp_min(0.0)
    one = 1.0 + kappa**2
    shifted = s[..., :r].clone()
    shifted[..., 0] -= psi / one
    shifted[..., -1] += kappa * psi / one
    Z = (U * shifted[..., None, :]) @ V.mT
    FW, FZ = (at.force(t, (X,))[0] for X in (path.W, Z))
    gap_top = top - s[..., 1] if r > 2 else top - low
    gap_low = s[..., r - 2] - low if r > 2 else top - low
    if r > 2:
        gaps = torch.stack(
            (1.0 / gap_top, kappa / gap_low, (1.0 + kappa) / (top - low), kappa / low)
        )
        simple = below(psi / one, gap_top) & below(kappa * psi / one, gap_low)
    else:
        gaps = torch.stack(((1.0 + kappa) / gap_top, kappa / low))
        simple = below((1.0 + kappa) * psi / one, gap_top)
    theta = psi / one * gaps.amax(0)
    M = U.mT @ FW @ V
    U_p, V_p = FW @ V - U @ M, FW.mT @ U - V @ M.mT
    turning = norm((torch.cat((U_p, V_p), -2),))
    delta = tail / (low - tail) * turning
    speed = (norm((M,)).square() + turning.square()).sqrt() + delta
    pushing = push * torch.diff(psi, dim=0, append=psi[-1:]) / h
    normal = spectral_norm(normal_part(U, V, FZ))
    bend_Z = (normal + kappa * pushing / one) / (2.0 * shifted[..., -1])
    bend_Y = c * norm((path.N,)) / linalg.svdvals(path.Y)[..., r - 1]
    gap = path.Y - Z
    e = norm((gap,))
    quotient = inner((gap,), (path.F - FZ,)) / e.square().clamp_min(1e-300)
    rate = from_the_start(e, quotient) + curvature * (bend_Y + bend_Z)
    source = stretch * theta * speed + defect * delta + force * norm((FW - FZ,))
    growth = trapezoid(path.times, rate)
    D = growth.exp() * (e[0] + trapezoid(path.times, (-growth).exp() * source))
    return {
        "e": e,
        "D": D,
        "d": norm((path.Y - path.W,)),
        "eps": norm((path.W - project(path.W, r, tau),)),
        "simple": (simple & below(tail, low)).to(e.dtype),
        "size": norm((path.Y,)),
        "t": path.times[:, None].expand_as(e),
    }


def check(
    sample: Sample,
    *,
    stretch: float = STRETCH,
    force: float = FORCE,
    defect: float = DEFECT,
    curvature: float = CURVATURE,
    push: float = PUSH,
) -> Evidence:
    at, tau = sample["problem"], sample["tau"]
    factors = {"stretch": stretch, "force": force, "defect": defect}
    factors |= {"curvature": curvature, "push": push}
    # Twelve steps a wave; the extremal flows have no waves.
    first = GRID * max(2, round(0.08 / sample.get("eps", 1.0)))
    q, moved = refine(
        lambda n: measure(at, tau, integrate(at, tau, n), **factors),
        ("e", "D"),
        tolerance=STEP_TOLERANCE,
        first=first,
        most=8 * first,
    )
    met = (q["simple"] > 0.5).all(0) & below(moved[GRID // 10 :], STEP_TOLERANCE).all(0)
    # P_{T_K} is a difference quotient with step η: its rounding, eps ‖Y‖/η, adds up over time.
    rounding = 8.0 * torch.finfo(moved.dtype).eps / ETA * q["size"] * q["t"]
    moved = moved + rounding / q["D"].clamp_min(1e-300)
    detail = {
        "e / ε, largest": float((q["e"].amax(0) / q["eps"].amax(0)).max()),
        "bound / ε, largest": float((q["D"].amax(0) / q["eps"].amax(0)).max()),
        "ε": float(q["eps"].max()),
    }
    reason = "the extreme singular values are not simple, or the flow is not resolved"
    return along_paths(q["e"], q["D"], met, moved=moved, reason=reason, detail=detail)


# Where each constant is attained. Inside K_τ (τ = 9: never at the bound) D is theorem A.
def sharp_bend(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """At the bound, a turned pair turns on at the rate κ_D, a share of it by κψ'."""
    return sharp_reach(seed, dtype, device, tau=2.0, theta=0.05, horizon=5e-3, rank=2)


def sharp_force(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    return {**sharp_lipschitz(seed, dtype, device, eps=1e-3, rank=2), "tau": 9.0}


def sharp_defect(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    return {**constant_defect(seed, dtype, device, rank=2), "tau": 9.0}


def figure(dtype: torch.dtype, device: torch.device):
    """Largest error and the certificates of B, C and D as the amplitude ε falls."""
    from ..plotting import COLOURS, MARKERS, new, slope

    amplitudes = (0.04, 0.02, 0.01)
    rows: dict[str, list[float]] = {"e": [], "D": [], "C": [], "B": []}
    for eps in amplitudes:
        given = sample(5, dtype, device, eps=eps, attraction=0.0)
        at, tau = given["problem"], given["tau"]
        path = integrate(at, tau, GRID * round(0.5 / eps))
        q = measure(at, tau, path)
        other, c = _constrained_paths.measure(at, tau, path), reach_constant(at.rank, tau)
        values = {"e": q["e"], "D": q["D"], "C": theorem_C(other, c, 1.0)}
        values["B"] = theorem_B(other, c, 1.0)
        for key, value in values.items():
            rows[key].append(float(value.amax(0).mean()))
    labels = {
        "e": "measured ‖Y - Z~‖",
        "D": "theorem D",
        "C": "theorem C, X = Π_K(W)",
        "B": "theorem B (for ‖Y - W‖)",
    }
    fig, ax = new(width=8.4)
    for k, (key, row) in enumerate(rows.items()):
        order = slope(amplitudes, row)
        label = f"{labels[key]}: slope {order:.2f}"
        ax.loglog(amplitudes, row, MARKERS[k] + "-", color=COLOURS[k + 1], label=label)
    ax.set(xlabel="amplitude ε: largest distance of W from K_τ", ylabel="distance, Frobenius norm")
    ax.set(title="A path that shakes across the boundary of K_τ with period 6ε")
    ax.set_xticks(amplitudes, [f"{eps:g}" for eps in amplitudes])
    ax.minorticks_off()
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return fig


CLAIM = Claim(
    id="approximation/constrained-linear",
    title="Theorem D: O(ε) with an active constraint",
    statement=(
        r"e'\le(\lambda+\kappa_D)e+\theta\|\dot Z\|+\delta+\|F(W)-F(\tilde Z)\|,\quad "
        r"\tilde Z=Z-\psi\,\frac{u_1v_1^\top-\kappa u_rv_r^\top}{1+\kappa^2},\quad "
        r"\psi\le\sqrt{1+\kappa^2}\,\varepsilon"
    ),
    hypotheses=("Ẏ = P_{T_K(Y)} F(Y), K = K_τ, τ > 0", "σ_1, σ_r simple after the first contact"),
    source=Source("ours", "theory/approximation/constrained_linear.py"),
    sample=sample,
    check=check,
    controls=(
        Control(
            "no running maximum's stretch θ",
            partial(check, stretch=0.0),
            partial(sample, attraction=0.0),
        ),
    ),
    extremal=tuple(map(Extremal, (sharp_bend, sharp_force, sharp_stretch, sharp_defect))),
    trials=3,
    figure=figure,
    float32="float64 only: P_{T_K} is a difference quotient with step 10⁻⁶",
)
