"""The full flow, the projected flow, and every quantity of theorem A measured along both.

Ẇ = F(t, W) is integrated by the classical Runge-Kutta method of order 4, and so is the factor ODE

    U̇ = (I - UUᵀ) F V S⁻¹,   Ṡ = Uᵀ F V,   V̇ = (I - VVᵀ) Fᵀ U S⁻ᵀ

of Ẏ = P_Y F(t, Y) (mathematics 1), re-orthonormalised by QR after each step. Everything else is
read off the stored path, all times at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrmanifold import linalg

from .problems import Layers, Problem

Measured = Mapping[str, Tensor]

# Number of intervals of the coarse grid on which results at different step sizes are compared.
GRID = 32


def norm(layers: Layers) -> Tensor:
    """Frobenius norm in the product metric, shape (...) without the matrix dimensions."""
    return torch.stack([torch.linalg.matrix_norm(Z).square() for Z in layers]).sum(0).sqrt()


def inner(A: Layers, B: Layers) -> Tensor:
    """Frobenius inner product in the product metric."""
    return torch.stack([(a * b).sum((-2, -1)) for a, b in zip(A, B, strict=True)]).sum(0)


def minus(A: Layers, B: Layers) -> Layers:
    """A - B, layer by layer."""
    return tuple(a - b for a, b in zip(A, B, strict=True))


def normal_part(U: Tensor, V: Tensor, Z: Tensor) -> Tensor:
    """P_W^⊥ Z = (I - UUᵀ) Z (I - VVᵀ)."""
    Z = Z - U @ (U.mT @ Z)
    return Z - (Z @ V) @ V.mT


def spectral_norm(Z: Tensor) -> Tensor:
    """Largest singular value, shape (...)."""
    return linalg.svdvals(Z)[..., 0]


def rk4(f: Callable[[Tensor, Layers], Layers], t: Tensor, h: float | Tensor, y: Layers) -> Layers:
    """One step of the classical Runge-Kutta method of order 4 for a tuple of tensors."""

    def shifted(k: Layers, c: float) -> Layers:
        return tuple(a + (c * h) * b for a, b in zip(y, k, strict=True))

    k1 = f(t, y)
    k2 = f(t + 0.5 * h, shifted(k1, 0.5))
    k3 = f(t + 0.5 * h, shifted(k2, 0.5))
    k4 = f(t + h, shifted(k3, 1.0))
    stages = zip(y, k1, k2, k3, k4, strict=True)
    return tuple(a + (h / 6.0) * (p + 2.0 * q + 2.0 * u + v) for a, p, q, u, v in stages)


@dataclass(frozen=True)
class Path:
    """Full and projected flow on a grid; tensors are stacked over time, shape (N + 1, B, ., .)."""

    times: Tensor
    W: Layers
    U: Layers
    S: Layers
    V: Layers

    @property
    def Y(self) -> Layers:
        """The projected flow as dense matrices."""
        return tuple(U @ S @ V.mT for U, S, V in zip(self.U, self.S, self.V, strict=True))


def best_factors(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors U, S, V of the best rank-r approximation Π_r W."""
    P, s, Qh = linalg.svd(W)
    return P[..., :r], torch.diag_embed(s[..., :r]), Qh[..., :r, :].mT


def factor_force(problem: Problem) -> Callable[[Tensor, Layers], Layers]:
    """Right-hand side of the factor ODE for the flat tuple (U₁, S₁, V₁, U₂, ...)."""

    def force(t: Tensor, y: Layers) -> Layers:
        triples = [y[i : i + 3] for i in range(0, len(y), 3)]
        F = problem.force(t, tuple(U @ S @ V.mT for U, S, V in triples))
        out: list[Tensor] = []
        for (U, S, V), Z in zip(triples, F, strict=True):
            ZV, ZtU = Z @ V, Z.mT @ U
            M = U.mT @ ZV
            out.append(torch.linalg.solve(S, ZV - U @ M, left=False))
            out.append(M)
            out.append(torch.linalg.solve(S.mT, ZtU - V @ M.mT, left=False))
        return tuple(out)

    return force


def integrate(problem: Problem, steps: int) -> Path:
    """Full and projected flow with `steps` equal steps."""
    h, W, start = problem.horizon / steps, problem.start, problem.low_rank_start
    t = torch.zeros((), dtype=W[0].dtype, device=W[0].device)
    if start is None:
        start = tuple(best_factors(Z, problem.rank) for Z in W)
    y = tuple(z for triple in start for z in triple)
    force = factor_force(problem)
    full, low = [W], [y]
    for _ in range(steps):
        W, y = rk4(problem.force, t, h, W), rk4(force, t, h, y)
        fixed: list[Tensor] = []
        for U, S, V in (y[i : i + 3] for i in range(0, len(y), 3)):
            (U, Ru), (V, Rv) = torch.linalg.qr(U), torch.linalg.qr(V)
            fixed += [U, Ru @ S @ Rv.mT, V]
        y, t = tuple(fixed), t + h
        full.append(W)
        low.append(y)

    def stacked(history: list[Layers], first: int, step: int) -> Layers:
        return tuple(torch.stack(z) for z in zip(*(p[first::step] for p in history), strict=True))

    times = torch.linspace(0.0, problem.horizon, steps + 1, dtype=t.dtype, device=t.device)
    return Path(times, stacked(full, 0, 1), *(stacked(low, k, 3) for k in range(3)))


def measure(problem: Problem, path: Path) -> Measured:
    """Everything theorem A speaks about, at every time and for every problem: shape (N + 1, B).

    ``e`` = ‖Y-X‖, ``distance`` = ‖Y-W‖, ``eps`` = ‖W-X‖, ``one_sided`` (the quotient that (H2)
    bounds by λ, on the segment [Y, X]), ``ell_eps`` = ‖F(X)-F(W)‖, ``bend`` = ‖P_Y^⊥F(Y)‖₂/σ_r(Y) +
    ‖P_X^⊥F(W)‖₂/σ_r(X), ``delta`` as in the theorem, ``s_X``, ``s_Y`` (σ_r, smallest over layers),
    ``tail`` = largest σ_{r+1}(W), ``mu`` = max(‖F(W)‖, ‖F(Y)‖).
    """
    t, r = path.times[:, None, None, None], problem.rank
    Y, svds = path.Y, [linalg.svd(W) for W in path.W]
    X = tuple((P[..., :r] * s[..., None, :r]) @ Qh[..., :r, :] for P, s, Qh in svds)
    FW, FX, FY = (problem.force(t, Z) for Z in (path.W, X, Y))
    s_X, s_Y, tails, bends, deltas = [], [], [], [], []
    for i, (P, s, Qh) in enumerate(svds):
        U, V = P[..., :r], Qh[..., :r, :].mT
        s_X.append(s[..., r - 1])
        s_Y.append(linalg.svdvals(path.S[i])[..., -1])
        tail = s[..., r] if s.shape[-1] > r else torch.zeros_like(s[..., 0])
        tails.append(tail)
        n_X = spectral_norm(normal_part(U, V, FW[i]))
        n_Y = spectral_norm(normal_part(path.U[i], path.V[i], FY[i]))
        bends.append(n_Y / s_Y[-1] + n_X / s_X[-1])
        # S_N vanishes on the block M, so only U_p and V_p of P_X F(W) enter the defect.
        M = U.mT @ FW[i] @ V
        U_p, V_p = FW[i] @ V - U @ M, FW[i].mT @ U - V @ M.mT
        deltas.append(tail / (s_X[-1] - tail) * norm((torch.cat((U_p, V_p), -2),)))
    gap = minus(Y, X)
    e = norm(gap)
    quotient = inner(gap, minus(FY, FX)) / e.square().clamp_min(1e-300)
    return {
        "e": e,
        "distance": norm(minus(Y, path.W)),
        "eps": norm(minus(path.W, X)),
        "one_sided": from_the_start(e, quotient),
        "ell_eps": norm(minus(FX, FW)),
        "delta": torch.stack(deltas).square().sum(0).sqrt(),
        "bend": torch.stack(bends).amax(0),
        "s_X": torch.stack(s_X).amin(0),
        "s_Y": torch.stack(s_Y).amin(0),
        "tail": torch.stack(tails).amax(0),
        "mu": torch.maximum(norm(FW), norm(FY)),
    }


def from_the_start(e: Tensor, quotient: Tensor) -> Tensor:
    """A quotient by e² whose value at t = 0, where e = 0, is extrapolated from the next times."""
    if bool((e[0] <= 1e-12).any()):
        cubic = 4.0 * quotient[1] - 6.0 * quotient[2] + 4.0 * quotient[3] - quotient[4]
        quotient = torch.cat((torch.where(e[0] <= 1e-12, cubic, quotient[0])[None], quotient[1:]))
    return quotient


def cumulative(times: Tensor, y: Tensor) -> Tensor:
    """∫₀ᵗ y on an equidistant grid, zero at the first time, by cubic interpolation: order 4.

    On [t_k, t_{k+1}]: h (-y_{k-1} + 13 y_k + 13 y_{k+1} - y_{k+2})/24, one-sided at both ends.
    """
    h = (times[1] - times[0]) / 24.0
    inside = 13.0 * (y[1:-2] + y[2:-1]) - y[:-3] - y[3:]
    first = 9.0 * y[:1] + 19.0 * y[1:2] - 5.0 * y[2:3] + y[3:4]
    last = 9.0 * y[-1:] + 19.0 * y[-2:-1] - 5.0 * y[-3:-2] + y[-4:-3]
    pieces = torch.cat((torch.zeros_like(y[:1]), first, inside, last))
    return h * pieces.cumsum(0)


def comparison(times: Tensor, rate: Tensor, source: Tensor, start: Tensor | float = 0.0) -> Tensor:
    """Solution of E' = rate E + source, E(0) = start, of order 4 in time where all is smooth.

    E(t) = e^{I(t)} (E(0) + ∫₀ᵗ e^{-I} source), I = ∫₀ᵗ rate.
    """
    growth = cumulative(times, rate)
    return growth.exp() * (start + cumulative(times, (-growth).exp() * source))


def on_grid(values: Tensor) -> Tensor:
    """The values at the GRID + 1 times common to all step sizes."""
    return values[:: (len(values) - 1) // GRID]


def refine(
    run: Callable[[int], Measured],
    watched: tuple[str, ...],
    *,
    tolerance: float = 1e-3,
    first: int = GRID,
    most: int = 16 * GRID,
) -> tuple[Measured, Tensor]:
    """Double the number of steps until the watched quantities stop moving on the coarse grid.

    Returns ------- measured, moved : Mapping of Tensor (GRID + 1, B), Tensor (GRID + 1, B) Values
    of the finest run, and by how much, relative to its value, any watched quantity moved in the
    last doubling, time by time. With a rule of order p the error left is about moved / (2^p - 1).
    Refining ends when `moved` is below the tolerance after a tenth of the time.
    """
    steps, old = first, {k: on_grid(v) for k, v in run(first).items()}
    while True:
        steps *= 2
        new = {k: on_grid(v) for k, v in run(steps).items()}
        moved = torch.zeros_like(new[watched[0]])
        for key in watched:
            size = new[key][1:].abs().clamp_min(1e-12)
            moved[1:] = torch.maximum(moved[1:], (new[key] - old[key])[1:].abs() / size)
        if bool((moved[GRID // 10 :] <= tolerance).all()) or steps >= most:
            return new, moved
        old = new
