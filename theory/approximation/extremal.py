"""Flows at which the constants of theorems A to D are attained.

All live in the span of u_r, u_⊥ and v_r, v_⊥: the singular pair of the smallest value and one
normal pair. The other singular values and the frames are random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import Sample
from .problems import Batch, Layers, Problem


class Corner:
    """X₀ with σ_r = 1, its last singular pair (u, v), and a normal pair.

    The other singular values lie in [2, 3], or all equal `others`.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device,
        others: float | None = None,
        rank: int | None = None,
    ) -> None:
        draw = Batch(seed, device)
        drawn = draw.integer(1, 3) if others is None else draw.integer(2, 4)
        self.rank = r = drawn if rank is None else rank
        U, V = draw.frames(r + 3, r + 1), draw.frames(r + 2, r + 1)
        self.values = draw.uniforms(r, low=2.0, high=3.0)
        if others is not None:
            self.values[:] = others
        self.values[:, -1] = 1.0
        self.U, self.V = U[..., :r], V[..., :r]
        self.u, self.v = U[..., r - 1 : r], V[..., r - 1 : r]
        self.u_p, self.v_p = U[..., r:], V[..., r:]
        self.X = (self.U * self.values[:, None, :]) @ self.V.mT

    def turned(self, theta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of X₀ with its last singular pair turned towards the normal pair by `theta`."""
        U, V, (c, s) = self.U.clone(), self.V.clone(), (math.cos(theta), math.sin(theta))
        U[..., -1:] = c * self.u + s * self.u_p
        V[..., -1:] = c * self.v + s * self.v_p
        return U, torch.diag_embed(self.values), V


def turned(J: Tensor, t: Tensor) -> Tensor:
    """e^{tJ} for J = p qᵀ - q pᵀ, p and q orthonormal."""
    eye = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    return eye + torch.sin(t) * J + (1.0 - torch.cos(t)) * (J @ J)


def sharp_exponent(
    seed: int, dtype: torch.dtype, device: torch.device, theta: float = 1e-3
) -> Sample:
    """Ȧ = ν u_⊥v_⊥ᵀ from A = X₀ with σ = ν = 1: a turn of the smallest pair grows like e^{νt/σ}.

    A(t) = X₀ + νt u_⊥v_⊥ᵀ, so X = X₀ stays and ε = νt; Y(0) is X₀ turned by θ. On M_r, θ' = (ν/σ)
    sin θ cos θ.
    """
    at = Corner(seed, device)
    push = at.u_p @ at.v_p.mT

    def force(t: Tensor, W: Layers) -> Layers:
        return ((push + 0.0 * t).expand_as(W[0]),)

    start = (at.turned(theta),)
    return {
        "problem": Problem("sharp exponent", force, (at.X,), at.rank, 0.8, 0.0, 0.0, start),
        "theta": theta,
    }


def sharp_lipschitz(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    eps: float = 0.01,
    horizon: float = 3.0,
    falling: bool = False,
    rank: int | None = None,
) -> Sample:
    """F sees only what is not low-rank: F(W) = ℓ⟨W, u_⊥v_⊥ᵀ⟩ u vᵀ with ℓ = 1, W₀ = X₀ + ε u_⊥v_⊥ᵀ.

    σ_r(W) grows like ℓεt while Y, which has no part along u_⊥v_⊥ᵀ, rests: ‖Y - X‖ = ℓεt exactly.
    With `falling`, F(W) = (ℓ⟨W, u_⊥v_⊥ᵀ⟩ - ε) u vᵀ: W rests and σ_r(Y) falls. λ = ℓ/2.
    """
    at = Corner(seed, device, rank=rank)
    unseen, moved = at.u_p @ at.v_p.mT, at.u @ at.v.mT
    offset = eps if falling else 0.0

    def force(t: Tensor, W: Layers) -> Layers:
        return (((W[0] * unseen).sum((-2, -1), keepdim=True) - offset) * moved,)

    start = (at.X + eps * unseen,)
    name = "sharp ℓ, falling" if falling else "sharp ℓ"
    return {"problem": Problem(name, force, start, at.rank, horizon, 1.0, 0.5)}


def constant_defect(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tail: float = 0.3,
    horizon: float = 0.02,
    turning: bool = False,
    rank: int | None = None,
) -> Sample:
    """A path that turns a singular pair into the normal one, where Π_r magnifies most.

    W₀ = X₀ + c u_⊥v_⊥ᵀ and Ȧ = (u_⊥vᵀ + u v_⊥ᵀ)/√2: S_N has eigenvalue q = c/σ there, so X moves
    at 1/(1 - q) times the speed of Y, e = δt for small t. With `turning`, Ȧ follows the frames of
    A, for long times: A(t) = R₁(t) A(0) R₂(t)ᵀ with both singular pairs turning at speed 1.
    """
    at = Corner(seed, device, rank=rank)
    normal = tail * at.u_p @ at.v_p.mT
    A0 = at.X + normal
    J1, J2 = (p @ q.mT - q @ p.mT for p, q in ((at.u_p, at.u), (at.v_p, at.v)))

    def force(t: Tensor, W: Layers) -> Layers:
        if not turning:
            tangent = (at.u_p @ at.v.mT + at.u @ at.v_p.mT) / math.sqrt(2.0)
            return ((tangent + 0.0 * t).expand_as(W[0]),)
        A = turned(J1, t) @ A0 @ turned(J2, t).mT
        return (J1 @ A + A @ J2.mT,)

    name = "turning path" if turning else "sharp δ"
    return {"problem": Problem(name, force, (A0,), at.rank, horizon, 0.0, 0.0)}


def attracted_path(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tail: float = 1e-3,
    attraction: float = 1000.0,
    horizon: float = 0.02,
) -> Sample:
    """The turning path of `constant_defect`, to which the flow is drawn at the rate m.

    F = Ȧ - m(W - A), but for the direction of A - Π_r A, along which nothing draws: so F(X) = F(W)
    and ℓ = 0 between X and W, λ = -m (1 - O(e²)) between Y and X, and e stays at δ/m.
    """
    at = Corner(seed, device)
    path = constant_defect(seed, dtype, device, tail=tail, turning=True)["problem"]
    J1, J2 = (p @ q.mT - q @ p.mT for p, q in ((at.u_p, at.u), (at.v_p, at.v)))

    def force(t: Tensor, W: Layers) -> Layers:
        (move,) = path.force(t, W)
        left, right = turned(J1, t), turned(J2, t)
        free = left @ at.u_p @ at.v_p.mT @ right.mT
        gap = W[0] - left @ path.start[0] @ right.mT
        gap = gap - (gap * free).sum((-2, -1), keepdim=True) * free
        return (move - attraction * gap,)

    name = "attracted path"
    return {"problem": Problem(name, force, path.start, at.rank, horizon, 0.0, -0.999 * attraction)}


def sharp_reach(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tau: float = 0.5,
    theta: float = 1e-2,
    horizon: float = 0.3,
    rank: int | None = None,
) -> Sample:
    """The sharp exponent on the boundary of K_τ: a normal force with a part in the core.

    σ(X₀) = (κ, ..., κ, 1), κ = 1+τ; Ȧ = N = a u_⊥v_⊥ᵀ + b (Σ_{i<r} u_i v_iᵀ/((r-1)κ) - u vᵀ) with
    a, b where Cauchy-Schwarz is an equality. X₀ = Π_K(A(t)) rests, and a turned pair turns on at
    the rate (a + b)/σ_r = 2c‖N‖/σ_r.
    """
    kappa = 1.0 + tau
    at = Corner(seed, device, others=kappa, rank=rank)
    p = (at.rank - 1) * kappa**2
    b = p / (1.0 + p)
    others = at.U[..., :-1] @ at.V[..., :-1].mT / ((at.rank - 1) * kappa)
    push = at.u_p @ at.v_p.mT + b * (others - at.u @ at.v.mT)

    def force(t: Tensor, W: Layers) -> Layers:
        return ((push + 0.0 * t).expand_as(W[0]),)

    start = (at.turned(theta),)
    problem = Problem("sharp reach", force, (at.X,), at.rank, horizon, 0.0, 0.0, start)
    return {"problem": problem, "tau": tau}


def sharp_stretch(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A path outside of K_τ whose smallest pair turns: Π_K(A) turns farther than Y by θ of D.

    A(t) = X₀ + ψ m + t u_⊥vᵀ, m the outward normal (u_1v_1ᵀ - κ u vᵀ)/(1 + κ²) and ψ constant. Y
    moves at the speed of A, and Π_K(A), whose last singular value is larger by κψ/(1 + κ²), at 1 +
    θ times that; κ = 3, so that κ/σ_r is the largest of the four terms in θ.
    """
    kappa, psi = 3.0, 0.2
    at = Corner(seed, device, others=kappa, rank=2)
    first = at.U[..., :1] @ at.V[..., :1].mT
    outward = (first - kappa * at.u @ at.v.mT) / (1.0 + kappa**2)
    turn = at.u_p @ at.v.mT

    def force(t: Tensor, W: Layers) -> Layers:
        return ((turn + 0.0 * t).expand_as(W[0]),)

    start = (at.X + psi * outward,)
    problem = Problem("sharp stretch", force, start, at.rank, 0.01, 0.0, 0.0)
    return {"problem": problem, "tau": kappa - 1.0}
