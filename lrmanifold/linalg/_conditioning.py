"""Well-conditioned cores: the clip onto cond <= 1 + tau and the penalty that pulls towards it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._common import check_square, checked, compute_dtype
from ._newton_schulz import clip_by_sign
from ._svd import svd, svdvals

Centre = Literal["metric", "mean"]


def condition_number(S: Tensor) -> Tensor:
    """Ratio of the largest to the smallest singular value, shape ``S.shape[:-2]``.

    Infinite for a singular matrix, NaN for the zero matrix. Computed by an SVD in the compute
    dtype, so that values above about 1e7 in float32 (1e15 in float64) mean "singular to working
    precision".
    """
    s = svdvals(S)
    return s[..., 0] / s[..., -1]


def _check_tau(tau: float) -> float:
    tau = float(tau)
    if not 0.0 <= tau < float("inf"):
        raise ValueError(f"tau must be a finite number >= 0, got {tau}")
    return tau


def metric_threshold(s: Tensor, kappa: float) -> Tensor:
    r"""The `t` of the nearest spectrum in ``[t, kappa t]``, i.e. the minimiser of
    :math:`f(t) = \sum_i \mathrm{dist}(s_i, [t, \kappa t])^2`.

    `f'` is piecewise linear and non-decreasing; the piece that holds its root is found among the
    breakpoints :math:`\{s_i\} \cup \{s_i/\kappa\}`, and there
    :math:`t = (\kappa \sum_{i \le p} s_i + \sum_{i > r-q} s_i)/(\kappa^2 p + q)` (mathematics 5).

    Parameters
    ----------
    s : Tensor, shape (..., r)
        Non-negative, in decreasing order.
    kappa : float
        At least 1.

    Returns
    -------
    Tensor, shape (...)
        Where `s` is feasible already, some `t` with all of `s` in ``[t, kappa t]``.
    """
    r = s.shape[-1]
    up = s.double().flip(-1).contiguous()
    zero = torch.zeros_like(up[..., :1])
    sums = torch.cat((zero, up.cumsum(-1)), -1)
    breaks = torch.cat((up, up / kappa), -1).sort(-1).values.contiguous()

    def counts(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = torch.searchsorted(up, t, right=False)
        below = torch.searchsorted(up, kappa * t, right=True)
        small = sums.gather(-1, q)
        big = sums[..., -1:] - sums.gather(-1, below)
        # float64 counts: an int64 tensor times a Python float would be float32
        return q.to(up.dtype), (r - below).to(up.dtype), small, big

    q, p, small, big = counts(breaks)
    slope = q * breaks - small + kappa * (kappa * p * breaks - big)
    # The root lies between the last breakpoint with f' <= 0 and the next one.
    left = ((slope <= 0).sum(-1, keepdim=True) - 1).clamp(0, 2 * r - 2)
    a, b = breaks.gather(-1, left), breaks.gather(-1, left + 1)
    q, p, small, big = counts(0.5 * (a + b))
    weight = kappa * kappa * p + q
    root = (kappa * big + small) / weight.clamp_min(1)
    t = torch.where(weight > 0, root.clamp(a, b), 0.5 * (a + b))
    return t[..., 0]


def clip_values(s: Tensor, tau: float, *, centre: Centre = "metric") -> Tensor:
    """Nearest singular values with ``max <= (1 + tau) min``; see :func:`spectral_clip`.

    Parameters
    ----------
    s : Tensor, shape (..., r)
        Non-negative, in decreasing order.
    tau : float
    centre : {"metric", "mean"}

    Returns
    -------
    Tensor, shape (..., r)
    """
    kappa = 1.0 + _check_tau(tau)
    if centre == "metric":
        t = metric_threshold(s, kappa).to(s.dtype)[..., None]
        return torch.minimum(torch.maximum(s, t), kappa * t)
    if centre == "mean":
        mean = s.mean(-1, keepdim=True)
        half = tau / (2.0 + tau)
        return torch.minimum(torch.maximum(s, (1.0 - half) * mean), (1.0 + half) * mean)
    raise ValueError(f"centre must be 'metric' or 'mean', got {centre!r}")


def spectral_clip(S: Tensor, tau: float, *, centre: Centre = "metric") -> Tensor:
    r"""Bring the singular values of `S` into a band of ratio ``1 + tau``.

    ``centre="metric"`` is the exact Frobenius projection onto
    :math:`\{S : \sigma_{\max} \le (1+\tau)\sigma_{\min}\}`: idempotent, the identity on feasible
    input. With `tau` = 0 it is the mean singular value times the polar factor.
    ``centre="mean"`` is the clamp published with CondLR, onto
    :math:`[\bar\sigma(1-d), \bar\sigma(1+d)]`, d = τ/(2+τ): feasible too, but no projection. It
    moves points of the set, and repeated it drifts (mathematics 5).

    An r x r SVD on the CPU, 20 to 25 r³ flops (for `tau` = 0 the polar factor, about 10 r³); on an
    accelerator products only, see `lrmanifold/linalg/_newton_schulz.py`.

    Parameters
    ----------
    S : Tensor, shape (..., r, r)
        Not the zero matrix. The result is unique if `S` is non-singular.
    tau : float
        At least 0; the bound for the condition number is 1 + `tau`.
    centre : {"metric", "mean"}

    Returns
    -------
    Tensor, shape (..., r, r)

    Raises
    ------
    ValueError
        If `tau` or `centre` is none of the above; on the CPU if `S` is zero or not finite.
    """
    tau = _check_tau(tau)
    if centre not in ("metric", "mean"):
        raise ValueError(f"centre must be 'metric' or 'mean', got {centre!r}")
    dtype = S.dtype
    S = checked(S, "S")
    check_square(S, "S")
    if S.numel() == 0:
        return S.to(dtype)
    on_cpu = S.device.type == "cpu"
    if on_cpu and not bool((S.abs().amax((-2, -1)) > 0).all()):
        raise ValueError("S must not be the zero matrix: it has no well-conditioned neighbour")
    if S.shape[-1] == 1:
        return S.to(dtype)
    if not on_cpu:
        return _clip_unchecked(S, tau, centre).to(dtype)
    U, s, Vh = svd(S)
    # Rounding leaves a clipped spectrum a few ulp outside; those few count as feasible.
    slack = 1.0 + 16 * torch.finfo(S.dtype).eps
    feasible = s[..., 0] <= (1.0 + tau) * slack * s[..., -1]
    if centre == "metric" and bool(feasible.all()):
        return S.to(dtype)
    values = clip_values(s, tau, centre=centre)
    # Only what leaves the band is changed: S + U diag(change) Vh keeps the rest to the last bit.
    clipped = S + (U * (values - s)[..., None, :]) @ Vh
    # But what is left of a dominant singular value would drown in its rounding.
    dominant = s[..., 0] > 2.0 * values[..., 0]
    if bool(dominant.any()):
        rebuilt = (U * values[..., None, :]) @ Vh
        clipped = torch.where(dominant[..., None, None], rebuilt, clipped)
    if centre == "metric":
        clipped = torch.where(feasible[..., None, None], S, clipped)
    return clipped.to(dtype)


def _clip_unchecked(S: Tensor, tau: float, centre: Centre) -> Tensor:
    """The clip for accelerators: a fixed number of products, no host synchronisation."""
    # In float64, so that the float32 result keeps to the band to its last digit.
    wide = S.double()
    norm = torch.linalg.matrix_norm(wide, keepdim=True)
    resolution = 0.1 * torch.finfo(S.dtype).eps
    change = clip_by_sign(wide / norm, tau, mean=centre == "mean", resolution=resolution)
    return S + (change * norm).to(S.dtype)


def conditioning_penalty(S: Tensor, *, squared: bool = False) -> Tensor:
    r"""RobustDLRT's regulariser :math:`R(S) = \|S^\top S - \alpha^2 I\|_F`, α² = ‖S‖²/r.

    Zero exactly for multiples of orthogonal matrices; it is √r times the standard deviation of the
    squared singular values, and :math:`\ln\mathrm{cond}(S) \le R/(\sqrt2\,\sigma_r^2)`.

    Parameters
    ----------
    S : Tensor, shape (..., r, r)
    squared : bool
        R² instead, which is smooth at R = 0.

    Returns
    -------
    Tensor, shape (...)
        Differentiable; at R = 0 the subgradient 0 is taken.

    References
    ----------
    S. Schotthöfer, H. L. Yang, S. Schnake, *Dynamical low-rank compression of neural networks with
    robustness under adversarial attacks*, arXiv 2505.08022. mathematics 5.
    """
    dtype = S.dtype
    E = _penalty_defect(S.to(compute_dtype(dtype)))
    value = E.square().sum((-2, -1))
    if not squared:
        # where twice: the square root's infinite slope at 0 would turn the subgradient into NaN.
        zero = value == 0
        root = torch.where(zero, torch.ones_like(value), value).sqrt()
        value = torch.where(zero, torch.zeros_like(value), root)
    return value.to(dtype)


def conditioning_penalty_grad(S: Tensor, *, squared: bool = False) -> Tensor:
    r"""Closed-form gradient :math:`2 S (S^\top S - \alpha^2 I)/R` of :func:`conditioning_penalty`.

    Parameters
    ----------
    S : Tensor, shape (..., r, r)
    squared : bool
        The gradient of R², ``4 S (SᵀS - α²I)``.

    Returns
    -------
    Tensor, shape (..., r, r)
        0 where R = 0 (a subgradient). At most 2 ‖S‖₂ in norm when not squared.
    """
    dtype = S.dtype
    S = S.to(compute_dtype(dtype))
    E = _penalty_defect(S)
    if squared:
        return (4.0 * (S @ E)).to(dtype)
    R = torch.linalg.matrix_norm(E, keepdim=True)
    # Below roundoff (of SᵀS, and of the clip that made S) E is noise of unit size, no gradient.
    floor = 16 * torch.finfo(S.dtype).eps * S.square().sum((-2, -1), keepdim=True)
    direction = torch.where(floor < R, E / R.clamp_min(torch.finfo(S.dtype).tiny), 0.0 * E)
    return (2.0 * (S @ direction)).to(dtype)


def _penalty_defect(S: Tensor) -> Tensor:
    """SᵀS - α²I."""
    check_square(S, "S")
    gram = S.mT @ S
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    alpha2 = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    return gram - alpha2[..., None, None] * identity
