"""Pairs of points of M_r, near and far, for the claims about curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from lrmanifold import Factors

from ..core import Sample
from ..sampling import Draw, dense


def truncated(A: Tensor, r: int) -> Factors:
    """Best rank-r approximation."""
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    return Factors(U[:, :r], torch.diag(s[:r]), Vh[:r].mT)


def smallest(X: Factors) -> Tensor:
    """σ_r(X)."""
    return torch.linalg.svdvals(X.S)[-1]


def angle(Q: Tensor, R: Tensor) -> Tensor:
    """‖QQᵀ - RRᵀ‖₂ for frames of equal rank: the sine of the largest principal angle.

    As ‖(I - RRᵀ)Q‖₂, which is accurate for small angles.
    """
    return torch.linalg.matrix_norm(Q - R @ (R.mT @ Q), 2)


def tangent(X: Factors, Z: Tensor) -> Tensor:
    """P_X Z = UUᵀZ + ZVVᵀ - UUᵀZVVᵀ, dense."""
    UtZ = X.U.mT @ Z
    return X.U @ UtZ + (Z @ X.V - X.U @ (UtZ @ X.V)) @ X.V.mT


def projector(X: Factors) -> Tensor:
    """The matrix of P_X on R^{mn}, shape (mn, mn): I - (I - UUᵀ) ⊗ (I - VVᵀ)."""
    A, B = (torch.eye(len(Q), dtype=Q.dtype, device=Q.device) - Q @ Q.mT for Q in (X.U, X.V))
    return torch.eye(len(X.U) * len(X.V), dtype=A.dtype, device=A.device) - torch.kron(A, B)


def projector_distance(X: Factors, Y: Factors) -> Tensor:
    """‖P_X - P_Y‖ as an operator on R^{m x n}, from the mn x mn matrices."""
    return torch.linalg.eigvalsh(projector(X) - projector(Y)).abs().max()


def draw_pair(
    draw: Draw, *, full_rank: bool = False, both_sides: bool = False
) -> tuple[Factors, Factors]:
    """Two points of M_r, float64 on the CPU, related in one of five ways.

    Independent; a step in a random direction; the point of turned row and column spaces that is
    nearest to X; X with both spaces turned alike; a step after which only singular values differ
    much. With `both_sides` the third kind always turns both spaces: turning one alone leaves X - Y
    tangent at Y.
    """
    m, n, r = draw.size(full_rank=full_rank)
    cond = draw.cond() if draw.uniform() < 0.5 else draw.cond(1.0, 2.0)
    X = draw.point(m, n, r, cond)
    h = draw.distance()
    kind = draw.seed % 5
    if kind == 0 or r == m == n:
        Y = draw.point(m, n, r, cond)
    elif kind == 1:
        Z = draw.normal(m, n)
        Y = truncated(dense(X) + h * smallest(X) * Z / Z.norm(), r)
    elif kind == 2:
        sides = ((h, h),) if both_sides or r == min(m, n) else ((h, 0.0), (0.0, h), (h, h))
        a, b = draw.choose(*sides)
        U = torch.linalg.qr(X.U + a * draw.normal(m, 1) @ draw.normal(1, r)).Q
        V = torch.linalg.qr(X.V + b * draw.normal(n, 1) @ draw.normal(1, r)).Q
        Y = Factors(U, U.mT @ dense(X) @ V, V)
    elif kind == 3:
        # S orthogonal, and both spaces turned along a pair of singular directions: the circle of
        # L3.4 inside a larger matrix.
        Q = draw.frame(r, r)
        w = draw.normal(r, 1)
        U = torch.linalg.qr(X.U + h * draw.normal(m, 1) @ w.mT).Q
        V = torch.linalg.qr(X.V + h * draw.normal(n, 1) @ w.mT @ Q).Q
        X = X._replace(S=Q)
        P, _, Oh = torch.linalg.svd(U.mT @ dense(X) @ V)
        Y = Factors(U, P @ Oh, V)
    else:
        Z = draw.normal(m, n)
        stretched = Factors(X.U, X.S @ (torch.eye(r) + 0.5 * draw.normal(r, r)), X.V)
        Y = truncated(dense(stretched) + h * smallest(X) * Z / Z.norm(), r)
    return (X, Y) if draw.uniform() < 0.5 else (Y, X)


def lowered(draw: Draw, X: Factors) -> Factors:
    """X, or in a quarter of the cases its best approximation of a lower rank, 0 included.

    For statements about any X of rank at most r. The factors stay those of rank r.
    """
    if draw.uniform() >= 0.25:
        return X
    P, s, Qh = torch.linalg.svd(X.S)
    s[draw.integer(0, len(s) - 1) :] = 0.0
    return X._replace(S=P * s @ Qh)


def pair(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    full_rank: bool = False,
    both_sides: bool = False,
    lower: bool = False,
    **fixed,
) -> Sample:
    """The sample of every claim about two points: ``X``, ``Y`` as factors and ``D = X - Y``.

    With `lower` the rank of X may be less than that of Y.
    """
    draw = Draw(seed, dtype, device, **fixed)
    X, Y = draw_pair(draw, full_rank=full_rank, both_sides=both_sides)
    X = lowered(draw, X) if lower else X
    # X - Y in float64: what is checked is geometry, not the cancellation of a difference.
    D = draw.give(dense(X) - dense(Y))
    return {"X": draw.give_point(X), "Y": draw.give_point(Y), "D": D}


def circle(theta: float, sigma: float, dtype: torch.dtype, device: torch.device) -> Sample:
    """The extremal pair of rank 1: Y = σ e₁e₁ᵀ and X = σ u uᵀ, u at an angle to e₁, both in R³.

    On the cone of 2 x 2 matrices these lie on a circle: where M_r is most curved.
    """
    e = torch.eye(3, dtype=torch.float64)
    t = torch.tensor(theta, dtype=torch.float64)
    u = torch.cos(t) * e[:, :1] + torch.sin(t) * e[:, 1:2]
    s = torch.tensor([[sigma]], dtype=torch.float64)
    X, Y = Factors(u, s, u), Factors(e[:, :1], s, e[:, :1])
    given = Draw(0, dtype, device)
    D = given.give(dense(X) - dense(Y))
    return {"X": given.give_point(X), "Y": given.give_point(Y), "D": D}


def one_sided(theta: float, sigma: float, dtype: torch.dtype, device: torch.device) -> Sample:
    """The extremal pair of rank 1 that turns the column space alone: Y = P_{U_Y} X, in R^{3 x
    2}."""
    sample = circle(theta, sigma, dtype, device)
    U_x, U_y = sample["X"].U, sample["Y"].U
    v = torch.eye(2, dtype=dtype, device=device)[:, :1]
    X, Y = Factors(U_x, sample["X"].S, v), Factors(U_y, (U_y.mT @ U_x) * sigma, v)
    return {"X": X, "Y": Y, "D": dense(X) - dense(Y)}
