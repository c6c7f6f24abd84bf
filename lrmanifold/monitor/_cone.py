"""Normal vectors of the set of cores with condition number at most κ."""

from __future__ import annotations

import torch
from torch import Tensor

# Values this near to the largest or smallest one count as equal to it: they were clipped to it.
_EQUAL = 1e-11


def normal_core(B: Tensor, s: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    """The normal vector nearest to B at the core diag(s), and its part on the smallest values.

    {S : σ_1 <= κσ_r} has at diag(s), s_1 = κs_r, the normal vectors A on the block of the largest
    values and -κC on that of the smallest ones, with A, C positive semidefinite of equal trace
    (κ = 1: all symmetric matrices of trace 0); inside of the set only 0. The projection onto that
    cone is one equation in one unknown, a multiplier.

    Parameters
    ----------
    B : Tensor, shape (..., r, r)
        In the singular frames of the core.
    s : Tensor, shape (..., r)
        Decreasing, max <= κ min.
    kappa : float

    Returns
    -------
    N, inward : Tensor of shape (..., r, r), Tensor of shape (...)
        The normal vector; the largest eigenvalue of κC, which is what L4.3 counts.
    """
    r = s.shape[-1]
    pairs = [_one(b, v, kappa) for b, v in zip(B.reshape(-1, r, r), s.reshape(-1, r), strict=True)]
    N = torch.stack([n for n, _ in pairs]).reshape(B.shape)
    return N, torch.stack([x for _, x in pairs]).reshape(s.shape[:-1])


def _one(B: Tensor, s: Tensor, kappa: float) -> tuple[Tensor, Tensor]:
    N, none = torch.zeros_like(B), B.new_zeros(())
    if len(s) == 1 or float(s[0]) < kappa * float(s[-1]) * (1.0 - _EQUAL):
        return N, none
    symmetric = 0.5 * (B + B.mT)
    if kappa == 1.0:
        N = symmetric - symmetric.diagonal().mean() * torch.eye(len(s), dtype=B.dtype)
        return N, (-torch.linalg.eigvalsh(N)[0]).clamp_min(0.0)
    top, low = s >= s[0] * (1.0 - _EQUAL), s <= s[-1] * (1.0 + _EQUAL)
    (a, P), (b, Q) = (torch.linalg.eigh(symmetric[x][:, x]) for x in (top, low))
    low_nu, high_nu = kappa * float(b.min()), float(a.max())
    if high_nu <= low_nu:
        return N, none
    for _ in range(80):
        nu = 0.5 * (low_nu + high_nu)
        more = (a - nu).clamp_min(0.0).sum() - (nu / kappa - b).clamp_min(0.0).sum() / kappa
        low_nu, high_nu = (nu, high_nu) if float(more) > 0.0 else (low_nu, nu)
    alpha, gamma = (a - low_nu).clamp_min(0.0), (high_nu / kappa - b).clamp_min(0.0) / kappa
    if not float(gamma.sum()) > 0.0:
        return N, none
    gamma = gamma * (alpha.sum() / gamma.sum())  # equal traces: exactly in the cone
    N[top.nonzero(), top.nonzero().mT] = (P * alpha) @ P.mT
    N[low.nonzero(), low.nonzero().mT] = -kappa * (Q * gamma) @ Q.mT
    return N, kappa * gamma.max()
