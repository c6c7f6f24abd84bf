"""Low-rank integrators of Ẏ = P_Y F(t, Y), written as on paper (mathematics 7).

One step takes (F, t, h, Y) with F a function (t, dense Y) -> dense F, and Y = U S Vᵀ as factors,
and returns the factors at t + h. The substeps for K, L and S are differential equations of their
own; they are solved by :func:`flow` so accurately that what is measured is the splitting. No
attempt is made to avoid m x n matrices; for that see :mod:`lrmanifold.retractions`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lrmanifold import Factors

Force = Callable[[float, Tensor], Tensor]
Scheme = Callable[[Force, float, float, Factors], Factors]

SUBSTEPS = 2


def flow(
    f: Callable[[float, Tensor], Tensor], t: float, h: float, y: Tensor, substeps: int = SUBSTEPS
) -> Tensor:
    """Solution of ẏ = f(t, y) after h, by the classical Runge-Kutta method of order 4."""
    k = h / substeps
    for i in range(substeps):
        s = t + i * k
        k1 = f(s, y)
        k2 = f(s + 0.5 * k, y + 0.5 * k * k1)
        k3 = f(s + 0.5 * k, y + 0.5 * k * k2)
        k4 = f(s + k, y + k * k3)
        y = y + (k / 6.0) * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    return y


def dense(Y: Factors) -> Tensor:
    """U S Vᵀ."""
    return Y.U @ Y.S @ Y.V.mT


def orth(*blocks: Tensor) -> Tensor:
    """Orthonormal basis of the columns of the blocks, whatever their rank."""
    return torch.linalg.qr(torch.cat(blocks, -1)).Q


def truncate(U: Tensor, S: Tensor, V: Tensor, r: int) -> Factors:
    """Best rank-r approximation of U S Vᵀ."""
    P, s, Qh = torch.linalg.svd(S, full_matrices=False)
    return Factors(U @ P[..., :r], torch.diag_embed(s[..., :r]), V @ Qh[..., :r, :].mT)


def from_dense(A: Tensor, r: int) -> Factors:
    """Best rank-r approximation of a dense matrix."""
    P, s, Qh = torch.linalg.svd(A, full_matrices=False)
    return Factors(P[..., :r], torch.diag_embed(s[..., :r]), Qh[..., :r, :].mT)


def tangent(Y: Factors, Z: Tensor) -> Tensor:
    """P_Y Z = UUᵀZ + ZVVᵀ - UUᵀZVVᵀ."""
    UUtZ = Y.U @ (Y.U.mT @ Z)
    return UUtZ + ((Z - UUtZ) @ Y.V) @ Y.V.mT


# -- the three substeps


def step_K(F: Force, t: float, h: float, K: Tensor, V: Tensor, substeps: int = SUBSTEPS) -> Tensor:
    """K̇ = F(t, K Vᵀ) V."""
    return flow(lambda s, K: F(s, K @ V.mT) @ V, t, h, K, substeps)


def step_L(F: Force, t: float, h: float, L: Tensor, U: Tensor, substeps: int = SUBSTEPS) -> Tensor:
    """L̇ = F(t, U Lᵀ)ᵀ U."""
    return flow(lambda s, L: F(s, U @ L.mT).mT @ U, t, h, L, substeps)


def step_S(
    F: Force, t: float, h: float, S: Tensor, U: Tensor, V: Tensor, substeps: int = SUBSTEPS
) -> Tensor:
    """Ṡ = Uᵀ F(t, U S Vᵀ) V."""
    return flow(lambda s, S: U.mT @ F(s, U @ S @ V.mT) @ V, t, h, S, substeps)


# -- splitting


def _K_then_back(F: Force, t: float, h: float, Y: Factors) -> Factors:
    """K forwards, S backwards: the first two thirds of KSL."""
    U, S = torch.linalg.qr(step_K(F, t, h, Y.U @ Y.S, Y.V))
    S = step_S(lambda s, Z: -F(s, Z), t, h, S, U, Y.V)
    return Factors(U, S, Y.V)


def _back_then_K(F: Force, t: float, h: float, Y: Factors) -> Factors:
    """S backwards, K forwards: the mirror image."""
    S = step_S(lambda s, Z: -F(s, Z), t, h, Y.S, Y.U, Y.V)
    U, S = torch.linalg.qr(step_K(F, t, h, Y.U @ S, Y.V))
    return Factors(U, S, Y.V)


def _L(F: Force, t: float, h: float, Y: Factors) -> Factors:
    V, R = torch.linalg.qr(step_L(F, t, h, Y.V @ Y.S.mT, Y.U))
    return Factors(Y.U, R.mT, V)


def ksl(F: Force, t: float, h: float, Y: Factors) -> Factors:
    """Projector splitting (Lubich and Oseledets 2014): K, S backwards, L."""
    return _L(F, t, h, _K_then_back(F, t, h, Y))


def strang(F: Force, t: float, h: float, Y: Factors) -> Factors:
    """Symmetric projector splitting: K/2, S/2, L, S/2, K/2."""
    half = 0.5 * h
    Y = _L(F, t, h, _K_then_back(F, t, half, Y))
    return _back_then_K(F, t + half, half, Y)


# -- basis update and Galerkin


def _galerkin(F: Force, t: float, h: float, Y: Factors, U: Tensor, V: Tensor, n: int) -> Factors:
    """The S-step in the bases U, V, from the projection of Y."""
    start = (U.mT @ Y.U) @ Y.S @ (Y.V.mT @ V)
    return Factors(U, step_S(F, t, h, start, U, V, n), V)


def bug(F: Force, t: float, h: float, Y: Factors, substeps: int = SUBSTEPS) -> Factors:
    """Basis update and Galerkin (Ceruti and Lubich 2022): K and L in parallel, then S."""
    U = orth(step_K(F, t, h, Y.U @ Y.S, Y.V, substeps))
    V = orth(step_L(F, t, h, Y.V @ Y.S.mT, Y.U, substeps))
    return _galerkin(F, t, h, Y, U, V, substeps)


def augmented(F: Force, t: float, h: float, Y: Factors, substeps: int = SUBSTEPS) -> Factors:
    """Augmented BUG (Ceruti, Kusch and Lubich 2022) before its truncation: rank 2r."""
    U = orth(Y.U, step_K(F, t, h, Y.U @ Y.S, Y.V, substeps))
    V = orth(Y.V, step_L(F, t, h, Y.V @ Y.S.mT, Y.U, substeps))
    return _galerkin(F, t, h, Y, U, V, substeps)


def augmented_bug(F: Force, t: float, h: float, Y: Factors, substeps: int = SUBSTEPS) -> Factors:
    """Augmented BUG, truncated to the old rank."""
    return truncate(*augmented(F, t, h, Y, substeps), r=Y.S.shape[-1])


def parallel_bug(F: Force, t: float, h: float, Y: Factors) -> Factors:
    """Parallel BUG (Ceruti, Kusch and Lubich 2024): K, L and S from the old point."""
    r = Y.S.shape[-1]
    K, L = step_K(F, t, h, Y.U @ Y.S, Y.V), step_L(F, t, h, Y.V @ Y.S.mT, Y.U)
    S = step_S(F, t, h, Y.S, Y.U, Y.V)
    new_U, new_V = orth(Y.U, K)[..., r:], orth(Y.V, L)[..., r:]
    below, right = new_U.mT @ K, L.mT @ new_V
    zero = S.new_zeros(*S.shape[:-2], below.shape[-2], right.shape[-1])
    core = torch.cat((torch.cat((S, right), -1), torch.cat((below, zero), -1)), -2)
    return truncate(torch.cat((Y.U, new_U), -1), core, torch.cat((Y.V, new_V), -1), r)


def midpoint_bug(F: Force, t: float, h: float, Y: Factors) -> Factors:
    """Midpoint BUG (Ceruti, Einkemmer, Kusch and Lubich 2024): Galerkin in bases of 4r columns.

    An augmented half step, then the bases [Û, h F V̂] and [V̂, h Fᵀ Û] with F at the midpoint.
    """
    half = augmented(F, t, 0.5 * h, Y)
    Z = h * F(t + 0.5 * h, dense(half))
    m, n = Z.shape[-2:]
    # More than m (or n) columns span everything: QR gives no more.
    U, V = orth(half.U, Z @ half.V)[..., :m], orth(half.V, Z.mT @ half.U)[..., :n]
    return truncate(*_galerkin(F, t, h, Y, U, V, SUBSTEPS), r=Y.S.shape[-1])


# -- methods on the manifold


def projected_euler(F: Force, t: float, h: float, Y: Factors) -> Factors:
    """Y + h P_Y F, truncated SVD."""
    Z = dense(Y)
    return from_dense(Z + h * tangent(Y, F(t, Z)), Y.S.shape[-1])


def projected_rk2(F: Force, t: float, h: float, Y: Factors) -> Factors:
    """Heun's method with tangent slopes and truncated SVDs (Kieri and Vandereycken 2019)."""
    Z, r = dense(Y), Y.S.shape[-1]
    first = tangent(Y, F(t, Z))
    trial = from_dense(Z + h * first, r)
    second = tangent(trial, F(t + h, dense(trial)))
    return from_dense(Z + 0.5 * h * (first + second), r)


def factor_euler(F: Force, t: float, h: float, Y: Factors) -> Factors:
    """Explicit Euler for the factor ODE, frames re-orthonormalised by QR. Not robust: uses S⁻¹."""
    Z = F(t, dense(Y))
    ZV, ZtU = Z @ Y.V, Z.mT @ Y.U
    M = Y.U.mT @ ZV
    U = Y.U + h * torch.linalg.solve(Y.S, ZV - Y.U @ M, left=False)
    V = Y.V + h * torch.linalg.solve(Y.S.mT, ZtU - Y.V @ M.mT, left=False)
    return Factors(_signed_qr(U), Y.S + h * M, _signed_qr(V))


def _signed_qr(A: Tensor) -> Tensor:
    """Q of the QR factorisation with a positive diagonal, so that Q(U) = U for orthonormal U."""
    Q, R = torch.linalg.qr(A)
    signs = torch.sign(R.diagonal(dim1=-2, dim2=-1))
    return Q * torch.where(signs == 0, torch.ones_like(signs), signs)[..., None, :]


SCHEMES: dict[str, Scheme] = {
    "KSL": ksl,
    "Strang-KSL": strang,
    "BUG": bug,
    "augmented BUG": augmented_bug,
    "parallel BUG": parallel_bug,
    "midpoint BUG": midpoint_bug,
    "projected Euler + SVD": projected_euler,
    "projected RK2 + SVD": projected_rk2,
    "factor ODE, Euler + QR": factor_euler,
}
ROBUST = tuple(SCHEMES)[:-1]


def integrate(scheme: Scheme, F: Force, Y: Factors, steps: int, horizon: float = 1.0) -> Factors:
    """Equal steps of one scheme from t = 0 to `horizon`."""
    h = horizon / steps
    for k in range(steps):
        Y = scheme(F, k * h, h, Y)
    return Y


def dlra(F: Force, Y: Factors, steps: int, horizon: float = 1.0) -> Tensor:
    """The flow Ẏ = P_Y F itself, dense: RK4 for the factor ODE, for well-conditioned cores only."""
    h, (U, S, V) = horizon / steps, Y

    def f(t: float, y: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = y
        Z = F(t, U @ S @ V.mT)
        ZV, ZtU = Z @ V, Z.mT @ U
        M = U.mT @ ZV
        dU = torch.linalg.solve(S, ZV - U @ M, left=False)
        return dU, M, torch.linalg.solve(S.mT, ZtU - V @ M.mT, left=False)

    y = (U, S, V)
    for k in range(steps):
        t = k * h
        k1 = f(t, y)
        k2 = f(t + 0.5 * h, _plus(y, k1, 0.5 * h))
        k3 = f(t + 0.5 * h, _plus(y, k2, 0.5 * h))
        k4 = f(t + h, _plus(y, k3, h))
        mean = tuple(a + 2.0 * b + 2.0 * c + d for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
        U, S, V = _plus(y, mean, h / 6.0)  # type: ignore[arg-type]
        (U, R_u), (V, R_v) = torch.linalg.qr(U), torch.linalg.qr(V)
        y = (U, R_u @ S @ R_v.mT, V)
    return dense(Factors(*y))


def _plus(
    y: tuple[Tensor, Tensor, Tensor], k: tuple[Tensor, Tensor, Tensor], h: float
) -> tuple[Tensor, Tensor, Tensor]:
    return y[0] + h * k[0], y[1] + h * k[1], y[2] + h * k[2]
