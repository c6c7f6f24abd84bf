"""Well-conditioned cores: the clip onto cond <= 1 + tau and the penalty that pulls towards it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from .._arguments import check_choice, check_number
from ..precision import without_autocast
from ._certificate import certified, relative_defect
from ._common import check_square, checked, compute_dtype, differentiated
from ._newton_schulz import inverse_square_root
from ._products import clip_by_products
from ._svd import svd, svdvals

Centre = Literal["metric", "mean"]

# Up to this condition number eigenvalues of SᵀS are as good as singular values.
_NEAR = 3.0
# A single core below this size has its SVD sooner than a certificate.
_SMALL = 24
# Entries beyond this, or below its inverse, are scaled first.
_RANGE = 1e12
# Rounding leaves a clipped spectrum a few ulp outside; so many count as feasible.
_SLACK = 16


def condition_number(S: Tensor) -> Tensor:
    """Ratio of the largest to the smallest singular value, shape ``S.shape[:-2]``.

    Infinite for a singular matrix, NaN for the zero matrix. Computed by an SVD in the compute
    dtype, so that values above about 1e7 in float32 (1e15 in float64) mean "singular to working
    precision".
    """
    s = svdvals(S)
    return s[..., 0] / s[..., -1]


def _check_tau(tau: float) -> float:
    if type(tau) is float and 0.0 <= tau < float("inf"):
        return tau  # each step comes here
    return check_number("tau", tau, low=0.0)


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
    wide = s.double()
    rows = wide.detach().flip(-1).reshape(-1, s.shape[-1]).tolist()
    if not differentiated(s):
        return wide.new_tensor([_threshold(row, kappa) for row in rows]).reshape(s.shape[:-1])
    inside = wide.new_tensor([_point_of_piece(row, kappa) for row in rows]).reshape(s.shape[:-1])
    above, below = wide > kappa * inside[..., None], wide < inside[..., None]
    p, q = above.sum(-1, dtype=wide.dtype), below.sum(-1, dtype=wide.dtype)
    # Over kappa, above and below the line, as its square might be beyond the largest number.
    top = (wide * above).sum(-1) + (wide * below).sum(-1) / kappa
    t = top / (kappa * p + q / kappa).clamp_min(1e-300)
    low, high = _ends(wide[..., 0], kappa, s.shape[-1])
    t = torch.minimum(torch.maximum(t, low), high)
    # Of feasible values every t in [s_1/kappa, s_r] will do; this one leaves them to the bit.
    return torch.where(wide[..., 0] <= kappa * wide[..., -1], wide[..., -1], t)


def _ends(largest: Any, kappa: float, r: int) -> tuple[Any, Any]:
    """Bounds for t where it is not feasible already; rounding blurs its piece for large kappa.

    There is a value above the band, so t <= s_1/kappa, and f'(t) = 0 with at most r - 1 below it
    gives (r - 1) t >= kappa (s_1 - kappa t).
    """
    return largest / (kappa + (r - 1) / kappa), largest / kappa


def _point_of_piece(up: list[float], kappa: float) -> float:
    """A point of the linear piece of f' that holds its root; `up` increases.

    A bisection over the breakpoints in plain Python: a few values, found ten times faster than by
    tensors.
    """
    sums = [0.0, *accumulate(up)]

    def slope(t: float) -> float:
        q, below = bisect_left(up, t), bisect_right(up, kappa * t)
        high = kappa * (len(up) - below) * t - (sums[-1] - sums[below])
        return q * t - sums[q] + kappa * high

    breaks = sorted(up + [x / kappa for x in up])
    left = max(bisect_right(breaks, 0.0, key=slope) - 1, 0)
    return 0.5 * (breaks[left] + breaks[min(left + 1, len(breaks) - 1)])


def _threshold(up: list[float], kappa: float) -> float:
    """:func:`metric_threshold` of one increasing spectrum."""
    if up[-1] <= kappa * up[0]:
        return up[0]
    t = _point_of_piece(up, kappa)
    q, below = bisect_left(up, t), bisect_right(up, kappa * t)
    p = len(up) - below
    low, high = _ends(up[-1], kappa, len(up))
    if not p + q:
        return high
    return min(max((sum(up[below:]) + sum(up[:q]) / kappa) / (kappa * p + q / kappa), low), high)


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
        if s.ndim == 1 and s.device.type == "cpu" and not differentiated(s):
            low = _threshold(s.tolist()[::-1], kappa)
            return s.clamp(low, min(kappa * low, torch.finfo(s.dtype).max))
        t = metric_threshold(s, kappa)[..., None]
        # κt from the float64 t: that of a large κ may have few digits in float32.
        return torch.minimum(torch.maximum(s, t.to(s.dtype)), (kappa * t).to(s.dtype))
    if centre == "mean":
        mean = s.mean(-1, keepdim=True)
        low, high = 2.0 / (2.0 + tau), 1.0 + tau / (2.0 + tau)
        return torch.minimum(torch.maximum(s, low * mean), high * mean)
    raise ValueError(f"centre must be 'metric' or 'mean', got {centre!r}")


@without_autocast
def spectral_clip(
    S: Tensor, tau: float, *, centre: Centre = "metric", margin: float = 0.0
) -> Tensor:
    r"""Bring the singular values of `S` into a band of ratio ``1 + tau``.

    ``centre="metric"`` is the exact Frobenius projection onto
    :math:`\{S : \sigma_{\max} \le (1+\tau)\sigma_{\min}\}`: idempotent, the identity on feasible
    input. With `tau` = 0 it is the mean singular value times the polar factor.
    ``centre="mean"`` is the clamp published with CondLR, onto
    :math:`[\bar\sigma(1-d), \bar\sigma(1+d)]`, d = τ/(2+τ): feasible too, but no projection. It
    moves points of the set, and repeated it drifts (mathematics 5).

    An r x r SVD on the CPU, 20 to 25 r³ flops (for `tau` = 0 the polar factor, about 10 r³); on an
    accelerator products only, see `lrmanifold/linalg/_products.py`. Derivatives on the CPU are
    those of the SVD: NaN where a core is moved of which singular values are equal.

    Parameters
    ----------
    S : Tensor, shape (..., r, r)
        Not the zero matrix. The result is unique if `S` is non-singular.
    tau : float
        At least 0; the bound for the condition number is 1 + `tau`. Beyond the inverse of the
        roundoff, 1e7 in float32, that is no more than "not singular to working precision".
    centre : {"metric", "mean"}
    margin : float
        In [0, 1). Feasible matrices stay as they are; the others are brought further inside, to a
        band of ratio ``1 + (1 - margin) tau``, so that the next ones need no change for a while.
        With the centre "mean" all of them are: a clamp with (1 - margin) tau.

    Returns
    -------
    Tensor, shape (..., r, r)

    Raises
    ------
    ValueError
        If `tau`, `centre` or `margin` is none of these; on the CPU if `S` is zero or not finite.
    """
    tau = _check_tau(tau)
    check_choice("centre", centre, ("metric", "mean"))
    if not 0.0 <= margin < 1.0:
        raise ValueError(f"margin must be in [0, 1), got {margin}")
    check_square(S, "S")
    dtype = S.dtype
    S = checked(S, "S")
    if S.numel() == 0:
        return S.to(dtype)
    on_cpu = S.device.type == "cpu"
    if on_cpu and not bool(S.any(-1).any(-1).all()):
        raise ValueError("S must not be the zero matrix: it has no well-conditioned neighbour")
    if S.shape[-1] == 1:
        return S.to(dtype)
    if not on_cpu:
        return _clip_unchecked(S, tau, centre, margin).to(dtype)
    largest = float(S.detach().abs().max())
    if not 1.0 / _RANGE < largest < _RANGE or S.ndim > 2:
        # Products with entries near the ends of the exponent range lose digits, or overflow; a
        # power of two loses none.
        sizes = S.detach().abs().amax((-2, -1), keepdim=True)
        power = torch.ldexp(torch.ones_like(sizes), torch.frexp(sizes).exponent - 1)
        if not bool(((sizes < _RANGE) & (sizes > 1.0 / _RANGE)).all()):
            return (spectral_clip(S / power, tau, centre=centre, margin=margin) * power).to(dtype)
    if not differentiated(S):
        small = S.ndim == 2 and S.shape[-1] < _SMALL
        found = (_clip_small if small else _clip_near)(S, tau, centre, margin)
        if found is not None:
            return found.to(dtype)
    U, s, Vh = svd(S)
    feasible = _feasible(s, tau)
    if centre == "metric" and bool(feasible.all()):
        return S.to(dtype)
    if centre == "metric" and differentiated(S) and bool(feasible.any()):
        # apart from the others: an SVD of equal values has no derivative, not even times zero
        moved = spectral_clip(S[~feasible], tau, margin=margin)
        return S.index_put((~feasible,), moved).to(dtype)
    values = clip_values(s, (1.0 - margin) * tau, centre=centre)
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


def _feasible(s: Tensor, tau: float) -> Tensor:
    """Whether max <= (1 + tau) min, up to rounding."""
    slack = 1.0 + _SLACK * torch.finfo(s.dtype).eps
    return s[..., 0] <= (1.0 + tau) * slack * s[..., -1]


def _clip_small(S: Tensor, tau: float, centre: Centre, margin: float) -> Tensor | None:
    """The clip of one small core by its SVD in as few calls as possible; None where it is hard."""
    try:
        U, s, Vh = torch.linalg.svd(S)
    except torch.linalg.LinAlgError:
        return None
    row = s.tolist()
    if not 0.0 < row[-1] <= row[0] < float("inf"):
        return None
    slack = 1.0 + _SLACK * torch.finfo(S.dtype).eps
    if centre == "metric" and row[0] <= (1.0 + tau) * slack * row[-1]:
        return S
    values = clip_values(s, (1.0 - margin) * tau, centre=centre)
    return S + (U * (values - s)) @ Vh if row[0] <= 2.0 * float(values[0]) else None


def _clip_near(S: Tensor, tau: float, centre: Centre, margin: float) -> Tensor | None:
    """The clip without an SVD: near the set, from SᵀS alone. None where that is not accurate.

    The usual case of a training step. A core that is certified to be feasible stays as it is;
    otherwise ``S f(SᵀS)``, with an eigendecomposition (τ > 0) or Newton-Schulz products (τ = 0). An
    eigenvalue of SᵀS is off by eps cond(S)², which counts for as much as the SVD's own rounding
    while cond(S) is small.
    """
    kappa = 1.0 + tau
    E, c = relative_defect(S)
    # Without a margin cores that move stay at the bound: in training nothing is ever certified.
    if centre == "metric" and tau > 0 and margin and certified(E, kappa):
        return S
    if tau == 0:
        size = torch.linalg.matrix_norm(E)
        worst = float(size.max())
        if not worst <= 0.5:
            return None
        Q = S @ inverse_square_root(E, worst) / c.sqrt()
        mean = (Q * S).sum((-2, -1), keepdim=True) / S.shape[-1]
        small = size <= _SLACK * torch.finfo(S.dtype).eps
        return torch.where(small[..., None, None], S, mean * Q)
    try:
        squares, Q = torch.linalg.eigh(E)
    except torch.linalg.LinAlgError:
        return None
    # NaN, Inf and squares that over- or underflow are for the SVD.
    low, high = float(squares.min()) + 1.0, float(squares.max()) + 1.0
    info = torch.finfo(S.dtype)
    clear = (c >= info.tiny / info.eps) & (c <= info.max * info.eps)
    if not 0.0 < high <= _NEAR**2 * low or not bool(clear.all()):
        return None
    s = (c[..., 0] * (1.0 + squares)).sqrt().flip(-1)
    feasible = _feasible(s, tau)
    if centre == "metric" and S.ndim == 2 and bool(feasible):
        return S
    values = clip_values(s, (1.0 - margin) * tau, centre=centre)
    change = (values / s - 1.0).flip(-1)
    clipped = S + ((S @ Q) * change[..., None, :]) @ Q.mT
    if centre == "metric":
        clipped = torch.where(feasible[..., None, None], S, clipped)
    return clipped


def _clip_unchecked(S: Tensor, tau: float, centre: Centre, margin: float = 0.0) -> Tensor:
    """The clip for accelerators: a fixed number of products, no host synchronisation."""
    flat = S.reshape(-1, *S.shape[-2:])
    clipped = clip_by_products(flat, tau, margin=margin, mean=centre == "mean")
    return clipped.reshape(S.shape)


@without_autocast
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
    check_square(S, "S")
    dtype = S.dtype
    S, size = _unit_size(S.to(compute_dtype(dtype)))
    E, size = _penalty_defect(S), size[..., 0, 0]
    value = E.square().sum((-2, -1))
    if squared:
        return (value * size**2 * size**2).to(dtype)
    # where twice: the square root's infinite slope at 0 would turn the subgradient into NaN.
    zero = value == 0
    root = torch.where(zero, torch.ones_like(value), value).sqrt()
    # not size**2, which may overflow where R does not
    return (torch.where(zero, torch.zeros_like(value), root) * size * size).to(dtype)


@without_autocast
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
    check_square(S, "S")
    dtype = S.dtype
    S, size = _unit_size(S.to(compute_dtype(dtype)))
    E = _penalty_defect(S)
    if squared:
        return (4.0 * (S @ E) * size * size**2).to(dtype)
    R = torch.linalg.matrix_norm(E, keepdim=True)
    # Below roundoff E is noise of unit size, no gradient: 2 eps of SᵀS, up to 30 of the clip that
    # made S (measured, float64, r = 3).
    floor = 64 * torch.finfo(S.dtype).eps * S.square().sum((-2, -1), keepdim=True)
    direction = torch.where(floor < R, E / R.clamp_min(torch.finfo(S.dtype).tiny), 0.0 * E)
    return (2.0 * (S @ direction) * size).to(dtype)


def _unit_size(S: Tensor) -> tuple[Tensor, Tensor]:
    """S over its largest entry, and that: squares of S would leave the exponent range."""
    size = S.detach().abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(S.dtype).tiny)
    return S / size, size


def _penalty_defect(S: Tensor) -> Tensor:
    """SᵀS - α²I."""
    gram = S.mT @ S
    identity = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    alpha2 = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    return gram - alpha2[..., None, None] * identity
