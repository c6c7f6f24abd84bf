"""Kernels for accelerators: matrix products alone, a fixed number, many matrices in one batch.

No host synchronisation, no decomposition, nothing that a CUDA graph cannot capture. Matrices come
as one batch (k, r, r) or (k, n, r). What a kernel cannot answer comes back as NaN for that matrix
alone, never as a wrong result: the optimizers leave such a weight as it is.

A batch may hold cores of several ranks, each continued by a multiple of the identity (see
:mod:`lrmanifold.optim.accelerator`); `valid` (k, r) is then 1 for the columns that are real.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..precision import without_autocast
from ._common import compute_dtype, differentiated
from ._orthonormal import gram

# Copies of 3/2 mu I laid out at once, so that "3/2 mu I - mu³/2 XᵀX" is one product.
_CHUNK = 8
# Singular values below this share of ‖S‖ count as zero: such a core has no polar factor here.
_SMALLEST = 1e-8
# Resolutions of the signs in Newton's steps for the threshold t. With one fine step feasible
# cores move by 3e-4 of their size; with two they stay to rounding.
_NEWTON = (3e-2, 1e-2, 1e-2, 1e-5, 1e-5)
# Up to this tau. Beyond it few values are outside, and a step may halve the distance only; counts
# there are multiplied by κ², so that every sign is made exact.
_NARROW = 0.1
_NEWTON_WIDE = (3e-2, 1e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-5, 1e-5, 1e-5)
# From here on signs tell on which side of the root a step is.
_SIDES = 1e-4
_FINAL = 1e-5
# How far, in shares of ‖S‖, the two ends of a clip may be out of balance: the error of the result
# to within a small factor (3e-4 was met, in float32 with spectra over six decades).
_UNBALANCED = 1e-4
# A core that a clip moves by less, in shares of ‖S‖, has no need of a margin.
_OUTSIDE = 1e-5
# A clipped value below this many ulp would be lost: of ‖S‖, and of what dominant ones are changed.
_LOST = 2e3, 2e4
# Entries of QᵀQ - I: an orthogonal factor is nearer, that of a singular core is not.
_DEFECT = 1e-5
# Longest step of a basis for which the root of its Gram matrix converges: ‖lr W‖₂² + 1.
_FAR = 1e4
# How far from orthonormal the first pass for a polar factor may be. One correction mends that, but
# not that the frame is turned by up to a third of it.
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
# Above this condition number the series for an inverse is longer than a factorisation.
SERIES_LIMIT = 3.0


def _norm(A: Tensor) -> Tensor:
    return torch.linalg.vector_norm(A, dim=(-2, -1), keepdim=True)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # kept for the steps of a training, too
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor that is sent to the device once."""
    return torch.tensor(values, dtype=dtype, device=device)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def identity(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity of size r, made once; not to be written to."""
    return torch.eye(r, dtype=dtype, device=device)


def _eye_like(A: Tensor) -> Tensor:
    return identity(A.shape[-1], A.dtype, A.device)


@functools.lru_cache(maxsize=256)
def _schedule(lower: float, tidy: int) -> tuple[float, ...]:
    """Scalings that take singular values in [lower, 1] to within 1e-3 of 1, then plain steps.

    mu² = 3/(1 + l + l²) is optimal for singular values in [l, 1]. It is capped, or 1 would go to
    about l and lose its sign to rounding there (Chen and Chow 2014).
    """
    scalings, low = [], lower
    while low < 1.0 - 1e-3:
        mu = min(math.sqrt(3.0 / (1.0 + low + low * low)), 1.69770248526)
        scalings.append(mu)
        low = min(0.5 * mu * x * (3.0 - mu * mu * x * x) for x in (low, 1.0))
    return (*scalings, *(1.0,) * tidy)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _identities(
    scalings: tuple[float, ...], r: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The matrices 3/2 mu I of some steps, (steps, r, r)."""
    eye = torch.eye(r, dtype=dtype, device=device)
    return torch.stack([eye * (1.5 * mu) for mu in scalings])


def _steps(X: Tensor, scalings: tuple[float, ...]) -> Iterator[tuple[float, Tensor]]:
    """Each scaling with a copy of its 3/2 mu I to write over, (k, r, r)."""
    for i in range(0, len(scalings), _CHUNK):
        part = scalings[i : i + _CHUNK]
        eyes = _identities(part, X.shape[-1], X.dtype, X.device)
        copies = eyes[:, None].expand(-1, X.shape[0], -1, -1).clone()
        yield from zip(part, copies.unbind(), strict=True)


def _tidy(A: Tensor) -> int:
    # The error 1 - sigma is squared by each plain step: 1e-3 ends below the unit roundoff.
    return 2 if A.dtype == torch.float32 else 3


def newton_schulz(X: Tensor, lower: float, tidy: int | None = None) -> Tensor:
    """Polar factors (of symmetric matrices: signs) of X, (k, r, r), ‖X‖₂ <= 1, two launches a step.

    Singular values below `lower` come out smaller than 1.
    """
    scalings = _schedule(lower, _tidy(X) if tidy is None else tidy)
    if differentiated(X):
        eye = _eye_like(X)
        for mu in scalings:
            X = X @ (1.5 * mu * eye - (0.5 * mu**3) * (X.mT @ X))
        return X
    for mu, P in _steps(X, scalings):
        X = torch.bmm(X, P.baddbmm_(X.mT, X, alpha=-0.5 * mu**3))
    return X


def _signs(A: Tensor, tolerance: float, tau: float, tidy: int | None = None) -> Tensor:
    """Signs of eigenvalues beyond `tolerance`, or finer: a wide band has a small lower end."""
    if tolerance <= _FINAL and A.dtype == torch.float64:
        tolerance = 1e-10
    return newton_schulz(A, max(tolerance / max(1.0, tau), 1e-12), tidy)


@without_autocast
def damped_polar_by_products(X: Tensor, damping: float) -> Tensor:
    r"""X (XᵀX + δ²I)^(-1/2), singular values σ/√(σ² + δ²), by products; ‖X‖₂ <= 1.

    It is the upper block of the polar factor of (X; δI), whose singular values are at least δ: no
    Gram matrix is inverted, so that float32 holds for every spectrum, rank-deficient ones too.

    Parameters
    ----------
    X : Tensor, shape (..., n, r)
    damping : float
        δ > 0. Each factor of 2.5 that it is smaller costs one more step of 4 (n + r) r² flops.
    """
    n, r = X.shape[-2:]
    flat = X.to(compute_dtype(X.dtype)).reshape(-1, n, r)
    scale = 1.0 / math.sqrt(1.0 + damping**2)
    below = (damping * scale) * _eye_like(flat)
    Y = torch.cat((flat * scale, below.expand(flat.shape[0], r, r)), -2)
    return newton_schulz(Y, damping * scale)[:, :n].view_as(X).to(X.dtype)


def clip_by_products(
    S: Tensor,
    tau: float,
    *,
    margin: float = 0.0,
    mean: bool = False,
    band: tuple[float, float] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    r"""The projection of cores onto cond <= 1 + tau, (k, r, r), by products alone.

    With :math:`S = QH` the clip is :math:`Q\,\mathrm{clip}(H; a, b)`, and
    :math:`\mathrm{clip}(H; a, b) - H = \tfrac12(|a - H| + (a - H)) - \tfrac12(|H - b| + (H - b))`
    with :math:`|A| = A\,\mathrm{sign}(A)`. The threshold a = t, b = (1 + τ)t of the exact
    projection is the root of a piecewise linear function (mathematics 5), found by Newton's method:
    its counts and sums are traces of signs. An eigenvalue too near to a threshold for its sign to
    be resolved contributes no more than its distance from it.

    In float32 cond exceeds 1 + tau by at most 1e-5 of it. NaN where a singular value is below
    1e-8 ‖S‖, where a few dominate so much that the others would be lost in their rounding, and
    where the threshold is not found, which may happen for `tau` of 10 and more, and for cores far
    outside. For `tau` beyond 0.1 about two and a half times the launches.

    Parameters
    ----------
    S : Tensor, shape (k, r, r)
    tau : float
    margin : float
        As in :func:`lrmanifold.linalg.spectral_clip`, but that cores outside by less than 1e-5 of
        ‖S‖ are clipped without it. Twice the work: a bound for the condition number would not know
        most feasible cores of a wide band.
    mean : bool
        The published clamp about the mean singular value.
    band : (float, float), optional
        Clip to these singular values instead; `tau` only tells how far they are apart.
    valid : Tensor, shape (k, r), optional
        Of a padded batch.

    Returns
    -------
    Tensor, shape (k, r, r)
    """
    if margin:
        inside = clip_by_products(S, (1.0 - margin) * tau, mean=mean, valid=valid)
        if mean:
            return inside
        nearest = clip_by_products(S, tau, valid=valid)
        return torch.where(_norm(nearest - S) <= _OUTSIDE * _norm(S), nearest, inside)
    k, r, _ = S.shape
    eye, norm = _eye_like(S), _norm(S)
    X = S / norm
    Q = newton_schulz(X, _SMALLEST)
    defect = torch.linalg.vector_norm(
        torch.baddbmm(eye, Q.mT, Q, alpha=-1.0), math.inf, dim=(-2, -1), keepdim=True
    )
    Q = torch.where(defect < _DEFECT, Q, math.nan)
    H = torch.bmm(Q.mT, X)
    H = torch.add(H, H.mT).mul_(0.5)
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    if valid is None:
        count = constant((float(r),), S.dtype, S.device)
        average = diagonal.sum(-1) / count
    else:
        count = valid.sum(-1)
        average = (diagonal * valid).sum(-1) / count
    if tau == 0:
        # The mean is at least 1/r of the norm: nothing drowns.
        return Q * (norm * average[:, None, None])
    minus = torch.addcmul(-H, average[:, None, None], eye)
    # From here on in units in which every shifted matrix has norm <= 1 or so: a is between 0 and
    # the average, b no further from it than the largest value. (Σ x⁴)^(1/4) is a bound for the
    # largest distance x that grows little with r: signs are as fine as it is close.
    reach, far, raw = min(tau, 1.0) * average, 2 if tau > 1.0 else 1, None
    if band is not None:
        raw = constant(band, S.dtype, S.device) / norm.view(k, 1) - average[:, None]
        reach = raw.abs().amax(-1)
    spread = _norm(torch.bmm(minus, minus)).sqrt()
    unit = torch.add(reach[:, None, None], spread, alpha=far)
    minus = minus / unit
    real = eye.expand(k, r, r) if valid is None else torch.diag_embed(valid)

    def shifted(ends: Tensor) -> Tensor:
        """a - H and b - H, (k, 2, r, r), from a and b minus the average."""
        return torch.addcmul(minus[:, None], ends[..., None, None], eye)

    if raw is not None:
        ends = raw / unit.view(k, 1)
    elif mean:
        half = tau / (2.0 + tau)
        ends = average[:, None] / unit.view(k, 1) * constant((-half, half), S.dtype, S.device)
    else:
        lift = tau * average[:, None] / unit.view(k, 1)
        ends, weight = _ends(shifted, minus, lift, count, tau, real)
    A = shifted(ends)
    flat = A.flatten(0, 1)
    M = torch.bmm(_signs(flat, _FINAL, tau), flat).view_as(A)
    # twice what is added at the lower end, and what is taken away at the upper one
    change = torch.addcmul(M, A, constant((1.0, -1.0), S.dtype, S.device).view(2, 1, 1))
    D = change[:, 0] - change[:, 1]
    lowest = torch.addcmul(average[:, None, None], ends[:, :1, None], unit)
    ulp = max(torch.finfo(S.dtype).eps, 1e-12)  # no finer than the signs in float64
    lost = lowest <= torch.add(ulp * _LOST[0], _norm(D) * unit, alpha=0.5 * ulp * _LOST[1])
    if band is None and not mean:
        # At the threshold they are in balance; Newton's method may not have come so far. Over the
        # weight q + κ²p, of one value at least, that is the error of t; over its root, of the core.
        sums = torch.bmm(change.view(k, 2, r * r), real.reshape(k, r * r, 1))
        balance = torch.matmul(constant((0.5, -0.5 * (1.0 + tau)), S.dtype, S.device), sums)
        weight = torch.maximum(weight, torch.where(balance < 0.0, (1.0 + tau) ** 2, 1.0))
        error = balance * unit.view(k, 1) * weight.rsqrt()
        lost = lost | (error.abs() > _UNBALANCED)[..., None]
    size = norm * torch.where(lost, math.nan, unit)
    return torch.addcmul(S, size, torch.bmm(Q, D + D.mT), value=0.25)


def _ends(
    shifted, minus: Tensor, lift: Tensor, count, tau: float, real: Tensor
) -> tuple[Tensor, Tensor]:
    """a = t and b = κt of the exact projection minus the average, (k, 2), and the slope q + κ²p.

    Newton's method on f' from traces of signs. With the sign Z of t - H there are q = (n + tr Z)/2
    values below t, with Z' of κt - H p = (n - tr Z')/2 above κt, and of their distances x from the
    average f' = q d + κ² p d + κ p lift - Σ x - κ Σ x'. So neither t = average + d nor the average
    occurs, which a small τ makes large in these units: only `lift` = τ average. `real` is the
    identity, or its part that is no padding.
    """
    k, r, _ = minus.shape
    kappa = 1.0 + tau
    inside = real @ minus
    basis = torch.stack((real, inside), 1).view(k, 2, r * r).mT
    a, b = 0.5 * kappa, 0.5 * kappa**2

    def small(*rows: tuple[float, ...]) -> Tensor:
        flat = constant(tuple(x for row in rows for x in row), minus.dtype, minus.device)
        return flat.view(len(rows), -1)

    # columns: κp, q + κ²p, and the sums of the distances
    mix = small((0.0, 0.5, 0.0), (0.0, 0.0, -0.5), (-a, -b, 0.0), (0.0, 0.0, a))
    # the distances add up to the rounding of the average, which counts where τ is as small
    drift = torch.bmm(basis[..., :1].mT, basis[..., 1:]).view(k, 1)
    base = (small((a, 0.5 + b, 0.0)) * count[:, None]).expand(k, 3)
    base = torch.addcmul(base, drift, small((0.0, 0.0, -0.5 - a)))
    ratio, upper = small((1.0, kappa)), lift * small((0.0, 1.0))
    d = lift * (-1.0 / (1.0 + kappa))
    wide = tau > _NARROW
    if wide:
        low = f_low = torch.full_like(d, -math.inf)
        high = f_high = torch.full_like(d, math.inf)
    for tolerance in _NEWTON_WIDE if wide else _NEWTON:
        A = shifted(torch.addcmul(upper, d, ratio)).flatten(0, 1)
        Z = _signs(A, tolerance, tau, 0 if tolerance > _SIDES and not wide else None)
        traces = torch.bmm(Z.view(k, 2, r * r), basis).view(k, 4)
        above, weight, rest = torch.addmm(base, traces, mix).split(1, -1)
        # Nothing outside of the band: weight and slope vanish, and t stays.
        slope = torch.addcmul(rest, above, lift, value=-1.0)
        slope = torch.addcmul(slope, weight, d, value=-1.0)
        weight = weight.clamp_min(0.25)
        step = torch.addcdiv(d, slope, weight)
        if wide and tolerance <= _SIDES:
            # Newton's steps may go in a circle: not beyond what is known to be too far.
            low, f_low = torch.where(slope > 0, d, low), torch.where(slope > 0, slope, f_low)
            high, f_high = torch.where(slope < 0, d, high), torch.where(slope < 0, slope, f_high)
            secant = (low * f_high - high * f_low) / (f_high - f_low)
            outside = (2.0 * step - low - high).abs() > 0.98 * (high - low)
            step = torch.where(outside, secant, step)
        d = step
    return torch.addcmul(upper, d, ratio), weight


def inverse_grams(S: Tensor, kappa: float) -> Tensor:
    """(SSᵀ)⁻¹ and (SᵀS)⁻¹ of cores with cond <= kappa, (2, k, r, r).

    1/c (I + E)(I + E²)(I + E⁴)... with E = I - SSᵀ/c, whose norm is below (κ⁴-1)/(κ⁴+1).
    """
    B = torch.stack((S.mT, S))
    G = torch.matmul(B.mT, B)
    # Eigenvalues over their mean lie in [1/κ², κ²], more exactly in some interval of that ratio.
    square = kappa * kappa * 1.001
    middle = 0.5 * (square + 1.0 / square)
    c = G.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * middle
    eye, size = _eye_like(S), 1.0 - 1.0 / (square * middle)
    E = torch.sub(eye, G / c)
    X = E + eye
    while size * size > torch.finfo(S.dtype).eps:
        E, size = torch.matmul(E, E), size * size
        X = X + torch.matmul(X, E)
    return X / c


def _inverse_root(G: Tensor, far: float) -> Tensor:
    """G^(-1/2) for eigenvalues in [1, far], (k, r, r): coupled Newton-Schulz."""
    r, eye = G.shape[-1], _eye_like(G)
    beta = _norm(G - eye) + 1.0
    YZ = torch.cat((G / beta, eye.expand_as(G)), -1)
    for mu, P in _steps(G, _schedule(far**-0.5, _tidy(G))):
        Y, Z = YZ.split(r, -1)
        YZ = torch.bmm(P.baddbmm_(Z, Y, alpha=-0.5 * mu**3), YZ)
    return YZ[..., r:] * beta.rsqrt()


def polar_pair(Y_u: Tensor, Y_v: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factors of two batches (k, m, r) and (k, n, r) with YᵀY >= I.

    That holds for every step Y = Q - lr W of an orthonormal Q with QᵀW = 0. The roots of all Gram
    matrices in one batch, then one correction with the true Gram matrix of the result, so that
    drift does not add up. NaN where the step was too long for the first pass: in float32 from
    ‖lr W‖₂ of about 10 on, if its singular values differ much, always beyond 100.
    """
    k = Y_u.shape[0]
    for last in (False, True):
        G = torch.cat((gram(Y_u), gram(Y_v)))
        eye = _eye_like(G)
        if last:
            E = torch.sub(G, eye)
            E = torch.where(_norm(E) < _CLOSE[E.dtype], E, math.nan)
            # (I + E)^(-1/2) up to 5/16 E³, which is below the rounding.
            K = torch.baddbmm(torch.sub(eye, E, alpha=0.5), E, E, alpha=0.375)
        else:
            K = _inverse_root(G, _FAR)
        Y_u, Y_v = torch.bmm(Y_u, K[:k]), torch.bmm(Y_v, K[k:])
    return Y_u, Y_v
