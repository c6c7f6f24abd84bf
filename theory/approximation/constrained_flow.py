"""The constrained flow Ẏ = P_{T_K(Y)} F(Y) on K_τ = {W in M_r : σ_1(W) <= (1+τ) σ_r(W)}.

**Projection** (L4.2): Π_K keeps the singular vectors of the truncated SVD and projects its
singular values. **Tangent cone**: for a prox-regular set the one-sided derivative of Π_K at Y ∈ K
is the projection onto the tangent cone, P_{T_K(Y)} Z = lim (Π_K(Y + ηZ) - Y)/η, here with η =
10⁻⁶: an O(η) truncation error and 10⁻¹⁰ of rounding, no decision about which constraints are
active.

**Discretisation**: Heun's method on the cone field g(Y) = P_{T_K(Y)} F(Y) with Π_K after both
stages,

    Y~ = Π_K(Y + h g(Y)),    Y⁺ = Π_K(Y + h/2 (g(Y) + g(Y~))).

It is of order 2 while the set of active constraints does not change. A step in which Y reaches or
leaves the boundary has a local error O(h²) (what g has too much, Π_K takes away), so the global
order stays 2 up to finitely many changes. Steps are doubled until nothing moves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lrmanifold import linalg

from .flows import rk4
from .problems import Problem

ETA = 1e-6


def reach_constant(rank: int, tau: float) -> float:
    """The sharp c with ⟨X-Y, N⟩ <= c ‖N‖_F ‖X-Y‖²/σ_r(Y) for Y, X in K_τ and normal N at Y.

    c = ½ sqrt((1 + 2p)/(1 + p)), p = (r-1)(1+τ)²: from ½ (r = 1: K = M_1) to 1/√2. Proof. L4.3
    bounds by (a + b)/(2σ_r), a = ‖N_⊥‖₂, b = largest inward part of N_S on the smallest singular
    values. N_S has spectrum Σ w_ij (e_i - κ e_j), i of at most r-1 largest, j of the smallest;
    with w = Σ w_ij, b <= κw and ‖N_S‖² >= w²/(r-1) + b² >= b² (1 + 1/p). So ‖N‖² >= a² + b²
    (1+p)/p, and Cauchy-Schwarz gives a + b <= ‖N‖ sqrt(1 + p/(1+p)). ∎ Attained: r-1 equal largest
    singular values, X = Y with its smallest singular pair turned into the normal space. It has a
    claim of its own, ``theory/conditioning/k_tau_prox.py``.
    """
    p = (rank - 1) * (1.0 + tau) ** 2
    return 0.5 * math.sqrt((1.0 + 2.0 * p) / (1.0 + p))


def project(W: Tensor, rank: int, tau: float) -> Tensor:
    """Π_{K_τ}(W), dense (L4.2)."""
    P, s, Qh = linalg.svd(W)
    values = linalg.clip_values(s[..., :rank], tau)
    return (P[..., :rank] * values[..., None, :]) @ Qh[..., :rank, :]


def cone(Y: Tensor, Z: Tensor, rank: int, tau: float) -> Tensor:
    """P_{T_K(Y)} Z for Y in K_τ."""
    return (project(Y + ETA * Z, rank, tau) - Y) / ETA


@dataclass(frozen=True)
class ConstrainedPath:
    """Full and constrained flow; W, Y, force F(Y) and normal force N_Y, each (N + 1, B, m, n)."""

    times: Tensor
    W: Tensor
    Y: Tensor
    F: Tensor
    N: Tensor


def integrate(problem: Problem, tau: float, steps: int) -> ConstrainedPath:
    """Both flows, `steps` equal steps from Y(0) = Π_K W(0) or the given start; one layer only."""
    r, h, W = problem.rank, problem.horizon / steps, problem.start
    Y = project(W[0], r, tau)
    if problem.low_rank_start is not None:
        U, S, V = problem.low_rank_start[0]
        Y = project(U @ S @ V.mT, r, tau)
    t = torch.zeros((), dtype=Y.dtype, device=Y.device)
    histories: tuple[list[Tensor], ...] = ([], [], [], [])

    for k in range(steps + 1):
        (F,) = problem.force(t, (Y,))
        g = cone(Y, F, r, tau)
        for history, value in zip(histories, (W[0], Y, F, F - g), strict=True):
            history.append(value)
        if k == steps:
            break
        trial = project(Y + h * g, r, tau)
        slope = cone(trial, problem.force(t + h, (trial,))[0], r, tau)
        Y = project(Y + 0.5 * h * (g + slope), r, tau)
        W, t = rk4(problem.force, t, h, W), t + h

    times = torch.linspace(0.0, problem.horizon, steps + 1, dtype=t.dtype, device=t.device)
    return ConstrainedPath(times, *(torch.stack(z) for z in histories))
