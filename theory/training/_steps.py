"""Two trainings side by side, step by step: W with all its freedom, Y on a low-rank manifold.

    W⁺ = W + hF_k(W),    Y⁺ = R_Y(hP_Y F_k(Y)),

the same field F_k, that is the same minibatch, for both. Every layer is a batch of B independent
problems, so a tensor is (B, m, n). The retraction is the library's, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import lrmanifold as lrm
from lrmanifold import linalg

from ..approximation.flows import inner, minus, norm, normal_part, spectral_norm
from ..approximation.problems import Layers

Field = Callable[[int, Layers], Layers]
Measured = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes
    ----------
    name : str
    field : callable
        (k, W) -> F_k(W): a descent direction of the minibatch of step k, one matrix for each layer.
    start : tuple of Tensor, shape (B, m, n) each
        W(0).
    ranks : tuple of int
        One for each layer.
    h : float
        Step.
    steps : int
    retraction : str
    low_rank_start : tuple of Tensor, optional
        Y(0) as dense matrices of those ranks, if it is not the best approximation of W(0).
    taus : tuple of float or None, optional
        Bounds of the condition numbers, one for each layer; None: no bound.
    """

    name: str
    field: Field
    start: Layers
    ranks: tuple[int, ...]
    h: float
    steps: int
    retraction: str = "svd"
    low_rank_start: Layers | None = None
    taus: tuple[float | None, ...] = ()

    @property
    def batch(self) -> int:
        """Number of independent problems."""
        return self.start[0].shape[0]


@dataclass(frozen=True)
class Companion:
    """A point X of rank r as singular triplets, and as a dense matrix."""

    U: Tensor
    s: Tensor
    V: Tensor

    @property
    def dense(self) -> Tensor:
        return (self.U * self.s[..., None, :]) @ self.V.mT


def best(W: Tensor, r: int, tau: float | None = None) -> Companion:
    """Π_r W, or Π_K W for K_τ (L4.2)."""
    P, s, Qh = linalg.svd(W)
    s = s[..., :r]
    values = s if tau is None else linalg.clip_values(s, tau)
    return Companion(P[..., :r], values, Qh[..., :r, :].mT)


def tangent(X: Companion, Z: Tensor) -> Tensor:
    """P_X Z."""
    return Z - normal_part(X.U, X.V, Z)


def plus(A: Layers, B: Layers, scale: float = 1.0) -> Layers:
    """A + scale B, layer by layer."""
    return tuple(a + scale * b for a, b in zip(A, B, strict=True))


def retracted(Y: Tensor, xi: Tensor, r: int, name: str) -> Tensor:
    """R_Y(ξ) by the library's retraction of that name, dense in and out."""
    m, n = Y.shape[-2:]
    M = lrm.FixedRank(m, n, r, retraction=name)
    X = M.from_dense(Y)
    return M.to_dense(M.retr(X, M.project_ambient(X, xi)))


def run(training: Training) -> list[Measured]:
    """What theorem T1 speaks about, for each step; tensors of shape (B,).

    ``e`` = ‖Y-X‖ before the step and ``next`` after it, ``one_sided`` (λ_k), ``bend`` = largest
    over the layers of ‖P_Y^⊥F(Y)‖₂/σ_r(Y) + ‖P_X^⊥F(W)‖₂/σ_r(X), ``ell_eps`` = ‖F(X) - F(W)‖,
    ``d``, ``rho``, ``G``; ``distance`` = ‖Y-W‖ and ``eps`` = ‖W-X‖ after it, ``s`` (σ_r, smallest
    of X, Y), ``mu`` = max(‖F(W)‖, ‖F(Y)‖).
    """
    h, r, W = training.h, training.ranks, training.start
    X = tuple(best(w, k) for w, k in zip(W, r, strict=True))
    Y = training.low_rank_start or tuple(x.dense for x in X)
    history = []
    for k in range(training.steps):
        at = tuple(best(y, j) for y, j in zip(Y, r, strict=True))
        dense_X = tuple(x.dense for x in X)
        FW, FX, FY = (training.field(k, Z) for Z in (W, dense_X, Y))
        PY = tuple(tangent(y, f) for y, f in zip(at, FY, strict=True))
        PX = tuple(tangent(x, f) for x, f in zip(X, FW, strict=True))
        W = plus(W, FW, h)
        Y_next = tuple(
            retracted(y, h * xi, j, training.retraction) for y, xi, j in zip(Y, PY, r, strict=True)
        )
        X_next = tuple(best(w, j) for w, j in zip(W, r, strict=True))
        moved_X = minus(tuple(x.dense for x in X_next), dense_X)
        gap = minus(Y, dense_X)
        e = norm(gap)
        bends = [
            spectral_norm(f - p) / y.s[..., -1] + spectral_norm(g - q) / x.s[..., -1]
            for f, p, y, g, q, x in zip(FY, PY, at, FW, PX, X, strict=True)
        ]
        history.append(
            {
                "e": e,
                "next": norm(minus(Y_next, tuple(x.dense for x in X_next))),
                "one_sided": inner(gap, minus(FY, FX)) / e.square().clamp_min(1e-300),
                "lipschitz": norm(minus(FY, FX)) / e.clamp_min(1e-150),
                "bend": torch.stack(bends).amax(0),
                "ell_eps": norm(minus(FX, FW)),
                "d": norm(plus(moved_X, PX, -h)) / h,
                "rho": norm(plus(minus(Y_next, Y), PY, -h)) / h,
                "G": norm(minus(PY, PX)),
                "distance": norm(minus(Y_next, W)),
                "eps": norm(minus(W, tuple(x.dense for x in X_next))),
                "s": torch.stack(
                    [torch.minimum(y.s[..., -1], x.s[..., -1]) for x, y in zip(X, at, strict=True)]
                ).amin(0),
                "mu": torch.maximum(norm(FW), norm(FY)),
            }
        )
        Y, X = Y_next, X_next
    return history


def stacked(history: list[Measured]) -> Mapping[str, Tensor]:
    """The same with all steps in one tensor, (steps, B)."""
    return {key: torch.stack([row[key] for row in history]) for key in history[0]}
