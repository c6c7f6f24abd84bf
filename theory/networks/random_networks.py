"""Small networks with every factor of the condition-number bounds at hand, in batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..sampling import Draw

SLOPE = 0.1


def leaky(z: Tensor) -> Tensor:
    """LeakyReLU with slope 0.1."""
    return torch.where(z > 0, z, SLOPE * z)


def leaky_derivative(z: Tensor) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), torch.full_like(z, SLOPE))


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of the last dimension."""
    return torch.linalg.vector_norm(x, dim=-1)


@dataclass(frozen=True)
class Net:
    """x -> W_L σ(W_{L-1} ... σ(W_1 x)), one net per batch element; W_i = U_i S_i V_iᵀ.

    Attributes
    ----------
    U, S, V : tuple of Tensor, shapes (B, n, r), (B, r, r), (B, n, r)
    """

    U: tuple[Tensor, ...]
    S: tuple[Tensor, ...]
    V: tuple[Tensor, ...]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return tuple(U @ S @ V.mT for U, S, V in zip(self.U, self.S, self.V, strict=True))


def random_net(draw: Draw, *, batch: int, sizes: tuple[int, ...], rank: int, tau: float) -> Net:
    """Uniform frames and full cores with singular values in [1, 1 + tau]: what CondLR trains."""
    U: list[Tensor] = []
    S: list[Tensor] = []
    V: list[Tensor] = []
    for n_in, n_out in pairwise(sizes):
        r = min(rank, n_in, n_out)
        Q_u, Q_v, P, Q = (torch.linalg.qr(draw.normal(batch, k, r)).Q for k in (n_out, n_in, r, r))
        values = draw.shares(batch, 1, r)
        for blocks, block in ((U, Q_u), (S, (P * (1.0 + tau * values)) @ Q.mT), (V, Q_v)):
            blocks.append(draw.give(block))
    return Net(tuple(U), tuple(S), tuple(V))


@dataclass(frozen=True)
class Bounds:
    """Condition number of a net at a point, and both products; each of shape (B,)."""

    measured: Tensor
    plain: Tensor
    corrected: Tensor


def bounds(net: Net, x: Tensor) -> Bounds:
    """cond(f; x), Π κ(W_i) Π cond(σ_i; z_i), and the same with 1/cos θ_i. x has shape (B, n)."""
    z, J = x, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(*x.shape, -1)
    plain, corrected = torch.ones_like(x[..., 0]), torch.ones_like(x[..., 0])
    for i, (W, S, V) in enumerate(zip(net.weights, net.S, net.V, strict=True)):
        s = torch.linalg.svdvals(S)
        kappa = s[..., 0] / s[..., -1]
        cosine = norm((V.mT @ z[..., None])[..., 0]) / norm(z)
        z, J = (W @ z[..., None])[..., 0], W @ J
        plain, corrected = plain * kappa, corrected * kappa / cosine
        if i + 1 < len(net.S):
            d, activated = leaky_derivative(z), leaky(z)
            cond = d.abs().amax(-1) * norm(z) / norm(activated)
            plain, corrected = plain * cond, corrected * cond
            z, J = activated, d[..., None] * J
    measured = torch.linalg.matrix_norm(J, 2) * norm(x) / norm(z)
    return Bounds(measured, plain, corrected)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Dense Jacobian of f at one vector x."""
    return torch.func.jacrev(f)(x)


def condition(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """‖J_f(x)‖₂ ‖x‖ / ‖f(x)‖."""
    return torch.linalg.matrix_norm(jacobian(f, x), 2) * x.norm() / f(x).norm()
