"""The integrators of mathematics 7 with dense float64 matrices, explicit Euler in each substep."""

from __future__ import annotations

from collections.abc import Callable

import dense_reference as dense
import torch
from torch import Tensor

Matrices = tuple[Tensor, Tensor, Tensor]
Gradient = Callable[[Tensor], Tensor]


def basis(A: Tensor) -> Tensor:
    """Left singular vectors: no gauge in common with a QR."""
    return torch.linalg.svd(A, full_matrices=False).U


def force(S: Tensor, weight_decay: float, penalty: float) -> Tensor:
    out = weight_decay * S
    return out + penalty * dense.penalty_gradient(S, squared=True) if penalty else out


def galerkin(
    U: Tensor, S: Tensor, V: Tensor, grad: Gradient, lr: float, steps: int, **terms
) -> Tensor:
    for _ in range(steps):
        S = S - lr * (U.mT @ grad(U @ S @ V.mT) @ V + force(S, **terms))
    return S


def best(W: Tensor, r: int) -> Matrices:
    U, s, Vh = torch.linalg.svd(W)
    return U[:, :r], torch.diag(s[:r]), Vh[:r].mT


def bug(X: Matrices, grad: Gradient, lr: float, s_steps: int = 1, **terms) -> Matrices:
    U, S, V = X
    G = grad(U @ S @ V.mT)
    U1, V1 = basis(U @ S - lr * G @ V), basis(V @ S.mT - lr * G.mT @ U)
    S = (U1.mT @ U) @ S @ (V.mT @ V1)
    return U1, galerkin(U1, S, V1, grad, lr, s_steps, **terms), V1


def augmented_bug(X: Matrices, grad: Gradient, lr: float, s_steps: int = 1, **terms) -> Matrices:
    """Before truncation; for 2r <= min(m, n)."""
    U, S, V = X
    G = grad(U @ S @ V.mT)
    U1 = basis(torch.cat((U, U @ S - lr * G @ V), 1))
    V1 = basis(torch.cat((V, V @ S.mT - lr * G.mT @ U), 1))
    S = (U1.mT @ U) @ S @ (V.mT @ V1)
    return U1, galerkin(U1, S, V1, grad, lr, s_steps, **terms), V1


def ksl(X: Matrices, grad: Gradient, lr: float, s_steps: int = 1, **terms) -> Matrices:
    U, S, V = X
    K = U @ S - lr * grad(U @ S @ V.mT) @ V
    U = basis(K)
    S = U.mT @ K
    S = S + lr * U.mT @ grad(U @ S @ V.mT) @ V
    L = V @ S.mT - lr * grad(U @ S @ V.mT).mT @ U
    V = basis(L)
    S = L.mT @ V
    return U, S - lr * force(S, **terms), V


STEPS = {"bug": bug, "augmented_bug": augmented_bug, "ksl": ksl}


def step(
    name: str, X: Matrices, grad: Gradient, *, lr: float, tau: float | None, **options
) -> Tensor:
    """The dense matrix after one step at fixed rank, on the set {cond <= 1 + tau}."""
    r = X[1].shape[0]
    U, S, V = STEPS[name](X, grad, lr, **options)
    if S.shape[0] > r:
        U, S, V = best(U @ S @ V.mT, r)
    if tau is not None:
        S = dense.nearest_well_conditioned(S, 1.0 + tau)
    return U @ S @ V.mT
