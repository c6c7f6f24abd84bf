"""Four families of full-matrix flows Ẇ = F(t, W), drawn in batches of independent problems.

Every family starts near the fixed-rank manifold, at W(0) = X₀ + noise, and is driven towards a
point (or along a path) near it, so that a well-behaved low-rank approximation X(t) exists: that is
the hypothesis of the approximation theorem. All are in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..sampling import Draw

Layers = tuple[Tensor, ...]
BATCH = 8


@dataclass(frozen=True)
class Problem:
    """A batch of B independent flows Ẇ = F(t, W) on [0, T], W one matrix or one per layer.

    Attributes
    ----------
    name : str
    force : callable
        (t, W) -> F; `t` is a tensor that broadcasts against the matrices (..., B, m, n).
    start : tuple of Tensor, shape (B, m, n) each
        W(0), one matrix per layer.
    rank : int
    horizon : float
        T.
    lipschitz, one_sided : float or None
        ℓ and λ of (H2), valid everywhere; None where there is no global constant (the net).
    low_rank_start : tuple of (U, S, V), optional
        Y(0), if it is not to be the best approximation of W(0).
    """

    name: str
    force: Callable[[Tensor, Layers], Layers]
    start: Layers
    rank: int
    horizon: float
    lipschitz: float | None
    one_sided: float | None
    low_rank_start: tuple[tuple[Tensor, Tensor, Tensor], ...] | None = None

    @property
    def batch(self) -> int:
        """Number of independent problems."""
        return self.start[0].shape[0]


class Batch(Draw):
    """A seeded source of batches of float64 matrices, on the device."""

    def __init__(self, seed: int, device: torch.device, size: int = BATCH) -> None:
        super().__init__(seed, torch.float64, device)
        self.batch = size

    def uniforms(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        x = self.shares(self.batch, *shape)
        return self.give(low + (high - low) * x)

    def normals(self, *shape: int) -> Tensor:
        return self.give(self.normal(self.batch, *shape))

    def frames(self, n: int, r: int) -> Tensor:
        """Orthonormal columns, shape (B, n, r)."""
        return self.give(torch.linalg.qr(self.normal(self.batch, n, r)).Q)

    def units(self, m: int, n: int) -> Tensor:
        """Matrices of Frobenius norm 1."""
        x = self.normals(m, n)
        return x / torch.linalg.matrix_norm(x, keepdim=True)

    def low_rank(self, m: int, n: int, values: Tensor) -> Tensor:
        """Matrices with the given singular values (B, r) and uniform singular vectors."""
        r = values.shape[-1]
        return (self.frames(m, r) * values[:, None, :]) @ self.frames(n, r).mT

    def values(self, r: int, spread: float) -> Tensor:
        """Singular values (B, r) between 1, which is attained, and `spread`."""
        values = self.uniforms(r, low=1.0, high=spread)
        values[:, 0] = 1.0
        return values


@dataclass(frozen=True)
class Setting:
    """Sizes of a problem.

    `spread` is the condition number of X₀ (σ_r(X₀) = 1), `change` the length of the way from X₀ to
    the target, `noise` the size of what is not low-rank in start and target. `lowest_curvature` is
    for quadratics, `restoring` for prescribed paths.
    """

    m: int = 10
    n: int = 8
    rank: int = 3
    spread: float = 2.0
    change: float = 0.6
    noise: float = 0.03
    horizon: float = 1.0
    lowest_curvature: float = 0.5
    restoring: float = 0.0


def best(W: Tensor, r: int) -> Tensor:
    """Π_r W, the truncated SVD, as a dense matrix."""
    P, s, Qh = torch.linalg.svd(W, full_matrices=False)
    return (P[..., :r] * s[..., None, :r]) @ Qh[..., :r, :]


def start_and_target(draw: Batch, m: int, n: int, at: Setting) -> tuple[Tensor, Tensor]:
    X0 = draw.low_rank(m, n, draw.values(at.rank, at.spread))
    target = best(X0 + at.change * draw.units(m, n), at.rank)
    return X0 + at.noise * draw.units(m, n), target


def quadratic(seed: int, device: torch.device, at: Setting) -> Problem:
    """Gradient flow of L(W) = ½⟨W - A, H(W - A)⟩ with a Hessian H of known extreme eigenvalues.

    H(Z) = Q₁(Ω ∘ Q₁ᵀ Z Q₂)Q₂ᵀ, the entries of Ω filling [lowest_curvature, 2]: strongly convex if
    the lower end is positive, weakly convex (λ > 0) if it is negative.
    """
    draw, low, high = Batch(seed, device), at.lowest_curvature, 2.0
    W0, target = start_and_target(draw, at.m, at.n, at)
    A = target + at.noise * draw.units(at.m, at.n)
    Q1, Q2 = draw.frames(at.m, at.m), draw.frames(at.n, at.n)
    weights = draw.uniforms(at.m, at.n, low=low, high=high)
    weights[:, 0, 0], weights[:, -1, -1] = low, high

    def force(t: Tensor, W: Layers) -> Layers:
        return (Q1 @ (weights * (Q1.mT @ (A - W[0]) @ Q2)) @ Q2.mT,)

    return Problem("quadratic", force, (W0,), at.rank, at.horizon, high, -low)


def completion(seed: int, device: torch.device, at: Setting) -> Problem:
    """Matrix completion: gradient flow of ½‖mask ∘ (W - A)‖², so ℓ = 1 and λ = 0."""
    draw = Batch(seed, device)
    W0, target = start_and_target(draw, at.m, at.n, at)
    A = target + at.noise * draw.units(at.m, at.n)
    mask = (draw.uniforms(at.m, at.n) < 0.7).to(A.dtype)

    def force(t: Tensor, W: Layers) -> Layers:
        return (mask * (A - W[0]),)

    return Problem("completion", force, (W0,), at.rank, at.horizon, 1.0, 0.0)


def tanh_net(seed: int, device: torch.device, at: Setting) -> Problem:
    """Training flow of x -> W₂ tanh(W₁ x) on a least-squares loss: two layers, product metric.

    The teacher's weights are low-rank, its outputs noisy. No global λ, ℓ: both are measured.
    """
    draw, data = Batch(seed, device), 4 * at.n
    (W1, T1), (W2, T2) = (start_and_target(draw, *k, at) for k in ((at.m, at.n), (at.n, at.m)))
    inputs = draw.normals(at.n, data)
    targets = T2 @ torch.tanh(T1 @ inputs) + at.noise * draw.normals(at.n, data)

    def force(t: Tensor, W: Layers) -> Layers:
        H = torch.tanh(W[0] @ inputs)
        R = (targets - W[1] @ H) / data
        return ((W[1].mT @ R * (1.0 - H * H)) @ inputs.mT, R @ H.mT)

    return Problem("tanh net", force, (W1, W2), at.rank, 2.0 * at.horizon, None, None)


def prescribed(seed: int, device: torch.device, at: Setting) -> Problem:
    """A given path: F(t, W) = Ȧ(t), A(t) = U(t) S(t) V(t)ᵀ + noise, so λ = ℓ = 0.

    U, S, V are linear in t; the noise turns in a plane. With `restoring` ρ > 0 the flow is also
    drawn to the path, F = Ȧ - weights ∘ (W - A) with weights in [0, ρ]: then ℓ = ρ and λ = 0.
    """
    draw, m, n, r = Batch(seed, device), at.m, at.n, at.rank
    U0, V0 = draw.frames(m, r), draw.frames(n, r)
    U1, V1 = at.change * draw.units(m, r), at.change * draw.units(n, r)
    S0 = torch.diag_embed(draw.values(r, at.spread))
    S1 = at.change * draw.units(r, r)
    N0, N1 = (at.noise * draw.units(m, n) for _ in range(2))
    weights = at.restoring * draw.uniforms(m, n)

    def force(t: Tensor, W: Layers) -> Layers:
        U, S, V = U0 + t * U1, S0 + t * S1, V0 + t * V1
        turning = torch.cos(2.0 * t) * N1 - torch.sin(2.0 * t) * N0
        F = U1 @ S @ V.mT + U @ S1 @ V.mT + U @ S @ V1.mT + 2.0 * turning
        if at.restoring:
            A = U @ S @ V.mT + torch.cos(2.0 * t) * N0 + torch.sin(2.0 * t) * N1
            F = F - weights * (W[0] - A)
        return (F,)

    W0 = U0 @ S0 @ V0.mT + N0
    return Problem("prescribed path", force, (W0,), r, at.horizon, at.restoring, 0.0)


FAMILIES: dict[str, Callable[[int, torch.device, Setting], Problem]] = {
    "quadratic": quadratic,
    "completion": completion,
    "tanh net": tanh_net,
    "prescribed path": prescribed,
}


def problem(
    seed: int,
    device: torch.device,
    *,
    families: tuple[str, ...] = tuple(FAMILIES),
    **fixed: float,
) -> Problem:
    """A problem of one of the families, in turn, with sizes drawn from the seed.

    Values in `fixed` (fields of :class:`Setting`) are used instead of drawn ones.
    """
    draw = Draw(seed, torch.float64, device)
    m, n = draw.integer(5, 12), draw.integer(4, 10)
    drawn = Setting(
        m=m,
        n=n,
        rank=draw.integer(1, min(m, n, 5) - 1),
        spread=draw.log_uniform(1.0, 4.0),
        change=draw.uniform(0.2, 0.8),
        noise=draw.log_uniform(1e-3, 0.1),
        lowest_curvature=draw.choose(0.5, 0.0, -0.5),
    )
    at = replace(drawn, **fixed)  # type: ignore[arg-type]
    return FAMILIES[families[seed % len(families)]](seed, device, at)
