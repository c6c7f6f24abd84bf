"""CondLR computed with dense float64 matrices, from the formulas of mathematics 1, 2, 5.

Nothing here calls the kernels of the library; scipy's polar factor and a search over all pieces of
the projection's objective take their place.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from lrmanifold.linalg import conditioning_penalty


def project_tangent(U: Tensor, V: Tensor, Z: Tensor) -> Tensor:
    """P_W Z = UUᵀZ + ZVVᵀ - UUᵀZVVᵀ."""
    left, right = U @ U.mT, V @ V.mT
    return left @ Z + Z @ right - left @ Z @ right


def nearest_well_conditioned(S: Tensor, kappa: float) -> Tensor:
    """Frobenius projection onto cond <= kappa: the best of the candidates t of all pairs (p, q)."""
    P, s, Qh = np.linalg.svd(S.numpy())
    if s[0] <= kappa * s[-1]:
        return S
    r, best = len(s), (np.inf, s)
    for p in range(r + 1):
        for q in range(r - p + 1):
            if p + q == 0:
                continue
            t = (kappa * s[:p].sum() + s[r - q :].sum()) / (kappa**2 * p + q)
            clipped = np.clip(s, t, kappa * t)
            best = min(best, (np.square(clipped - s).sum(), clipped), key=lambda x: x[0])
    return torch.from_numpy(P @ np.diag(best[1]) @ Qh)


def polar(A: Tensor) -> Tensor:
    """Orthonormal polar factor."""
    return torch.from_numpy(scipy.linalg.polar(A.numpy())[0])


def penalty_gradient(S: Tensor, *, squared: bool) -> Tensor:
    """∇R(S) by autograd of its definition."""
    S = S.clone().requires_grad_()
    with torch.enable_grad():
        conditioning_penalty(S, squared=squared).backward()
    assert S.grad is not None
    return S.grad


def step(
    U: Tensor,
    S: Tensor,
    V: Tensor,
    G: Tensor,
    b: Tensor | None,
    *,
    tau: float | None,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    penalty: float,
    penalty_squared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One step of one matrix from its dense gradient `G`; `b` is the dense momentum."""
    # The gradient of ½ wd ‖W‖² is tangent already.
    xi = project_tangent(U, V, G) + weight_decay * (U @ S @ V.mT)
    direction = xi
    if momentum:
        b = xi if b is None else momentum * b + xi
        direction = xi + momentum * b if nesterov else b
    if penalty:
        force = penalty_gradient(S, squared=penalty_squared)
        direction = direction + penalty * (U @ force @ V.mT)
    D = -lr * direction
    M = U.mT @ D @ V
    U_p, V_p = D @ V - U @ M, D.mT @ U - V @ M.mT
    inverse = torch.linalg.inv(S)
    Y_U, Y_V = polar(U + U_p @ inverse), polar(V + V_p @ inverse.mT)
    Y_S = S + M
    if tau is not None:
        Y_S = nearest_well_conditioned(Y_S, 1.0 + tau)
    return Y_U, Y_S, Y_V, (transport(U, inverse, V, b, Y_U, Y_S, Y_V) if momentum else None)


def transport(U, inverse, V, b, Y_U, Y_S, Y_V) -> Tensor:
    """The velocities of the factors of `b`, without their parts in the new bases."""
    M = U.mT @ b @ V
    U_dot = (b @ V - U @ M) @ inverse
    V_dot = (b.mT @ U - V @ M.mT) @ inverse.mT
    U_dot, V_dot = U_dot - Y_U @ Y_U.mT @ U_dot, V_dot - Y_V @ Y_V.mT @ V_dot
    return Y_U @ M @ Y_V.mT + U_dot @ Y_S @ Y_V.mT + Y_U @ Y_S @ V_dot.mT
