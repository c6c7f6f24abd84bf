r"""Integrators: maps from a point and a tangent vector to a point, one signature for all.

A low-rank retraction *is* an integrator for the increment ξ: every function here takes
``(manifold, X, xi)``, with `X` a packed point U S Vᵀ, `xi` a packed tangent vector (U_p, M, V_p),
both of shape (..., m + r + n, r), their batches broadcast, and returns a packed point near W + ξ.
All end with ``manifold.project_core``, so that on :class:`~lrmanifold.WellConditioned` the result
is in the set.
Costs count flops in units of (m+n) r², beside O(r³) for the cores.

==================  ======  ==========  ==========================================================
name                order   cost        choose it
==================  ======  ==========  ==========================================================
``svd``             2       20          as the reference: the nearest point to W + ξ
``orthographic``    2       10          for line searches: its inverse is a projection
``factored``        1       6           for training on well-conditioned cores (the CondLR step)
``ksl``             2       15          when σ_r is tiny: no inverse of S
``strang``          2       24          the same, symmetrised
``bug``             2       10          when σ_r is tiny, K and L in parallel
``augmented_bug``   2       30          with :class:`~lrmanifold.optim.RankScheduler`'s bases
``parallel_bug``    2       24          the same, all three updates in parallel
==================  ======  ==========  ==========================================================

"Order 2" means that the tangential part of d²/dt² R(tξ) vanishes at 0, so that the curve agrees
with the geodesic up to O(t³).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import linalg
from ._arguments import check_callable, check_choice, check_flag, check_text
from .factors import joined

if TYPE_CHECKING:
    from .manifolds import FixedRank

Retraction = Callable[["FixedRank", Tensor, Tensor], Tensor]

_REGISTRY: dict[str, Retraction] = {}
_OWN: frozenset[str] = frozenset()  # names that are never replaced: filled at the end


def register(name: str, *, overwrite: bool = False) -> Callable[[Retraction], Retraction]:
    """Decorator that adds a retraction to the registry under `name`.

    Parameters
    ----------
    name : str
    overwrite : bool
        Replace a retraction registered before under this name, as where a notebook's cell is run
        again. Manifolds made before keep the function that they were made with. The library's own
        retractions are never replaced.

    Raises
    ------
    TypeError
        If the name is no string, or what is registered no function.
    ValueError
        If the name is taken: by one of the library's own, or by another without `overwrite`.
    """
    check_text("name", name)
    check_flag("overwrite", overwrite)

    def add(function: Retraction) -> Retraction:
        check_callable("function", function, "a function (manifold, X, xi) -> Y")
        if name in _OWN:
            raise ValueError(
                f"name must not be that of one of the library's own retractions, got {name!r}: "
                "choose another"
            )
        if name in _REGISTRY and not overwrite:
            raise ValueError(
                f"a retraction named {name!r} is registered already: choose another name, or "
                f"replace it by register({name!r}, overwrite=True)"
            )
        _REGISTRY[name] = function
        return function

    return add


def available() -> tuple[str, ...]:
    """Names of the registered retractions, in alphabetical order."""
    return tuple(sorted(_REGISTRY))


def get(retraction: str | Retraction) -> Retraction:
    """The function behind a name; a function is returned as it is.

    Raises
    ------
    TypeError
        If it is neither a string nor a function.
    ValueError
        If there is no retraction of that name.
    """
    if callable(retraction):
        return retraction
    return _REGISTRY[check_choice("retraction", retraction, available(), or_="a function")]


def _finish(manifold: FixedRank, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    return manifold.pack(U, manifold.project_core(S), V)


def _basis(K: Tensor) -> Tensor:
    """Orthonormal basis whatever the rank of K: small singular values must do no harm."""
    return linalg.qr(K, rank_deficient=True)[0]


def _truncate(manifold: FixedRank, U: Tensor, core: Tensor, V: Tensor) -> Tensor:
    """Best rank-r approximation of U core Vᵀ with orthonormal U, V of more than r columns."""
    r = manifold.rank
    P, s, Qh = linalg.svd(core)
    S = torch.diag_embed(s[..., :r])
    return _finish(manifold, U @ P[..., :r], S, V @ Qh[..., :r, :].mT)


class _Increment:
    """The dense increment ξ of a point, applied to thin matrices without being formed."""

    def __init__(self, manifold: FixedRank, X: Tensor, xi: Tensor) -> None:
        self.X, self.xi = manifold.unpack(X), manifold.unpack(xi)

    def times(self, Q: Tensor) -> Tensor:
        """ξ Q."""
        (U, _, V), (U_p, M, V_p) = self.X, self.xi
        overlap = V.mT @ Q
        return U @ (M @ overlap + V_p.mT @ Q) + U_p @ overlap

    def transposed_times(self, Q: Tensor) -> Tensor:
        """ξᵀ Q."""
        (U, _, V), (U_p, M, V_p) = self.X, self.xi
        overlap = U.mT @ Q
        return V @ (M.mT @ overlap + U_p.mT @ Q) + V_p @ overlap


def _k_and_s(K: Tensor, dK: Tensor) -> tuple[Tensor, Tensor]:
    """K-step by dK, then the S-step back by the same increment: the new basis and core."""
    K = K + dK
    U = _basis(K)
    return U, U.mT @ (K - dK)


def _galerkin(X, xi, U: Tensor, V: Tensor) -> Tensor:
    """Uᵀ (W + ξ) V from thin products."""
    left, right = U.mT @ X.U, X.V.mT @ V
    return left @ ((X.S + xi.S) @ right + xi.V.mT @ V) + (U.mT @ xi.U) @ right


@register("svd")
def svd(manifold: FixedRank, X: Tensor, xi: Tensor) -> Tensor:
    """Metric projection of W + ξ: truncated SVD through a 2r x 2r core. Second order.

    ``W + ξ = [U U_p] [[S + M, I], [I, 0]] [V V_p]ᵀ``; two Householder QR of 2r columns, 20 units in
    all, and an SVD of size 2r. Works for any step and any S, singular included, and takes vectors
    that are not quite tangent. Differs from W + ξ by at most t²‖U_p‖‖V_p‖/(σ_r - t‖M‖₂)
    (mathematics 2).
    """
    Xf, xif = manifold.unpack(X), manifold.unpack(xi)
    r = manifold.rank
    Q_u, R_u = linalg.qr(joined(Xf.U, xif.U, dim=-1), rank_deficient=True)
    Q_v, R_v = linalg.qr(joined(Xf.V, xif.V, dim=-1), rank_deficient=True)
    core = R_u[..., :r] @ ((Xf.S + xif.S) @ R_v[..., :r].mT + R_v[..., r:].mT)
    core = core + R_u[..., r:] @ R_v[..., :r].mT
    return _truncate(manifold, Q_u, core, Q_v)


@register("orthographic")
def orthographic(manifold: FixedRank, X: Tensor, xi: Tensor) -> Tensor:
    """(U D + U_p) D⁻¹ (D Vᵀ + V_pᵀ) with D = S + M. Second order, 10 units.

    The point whose projection on the tangent space at W is W + ξ: its inverse is
    ``project_ambient(X, Y - W)`` exactly, see :func:`inverse_orthographic`. Needs D invertible;
    steps with ‖M‖₂ near σ_r go far (mathematics 2, Absil-Oseledets 2015).
    """
    Xf, xif = manifold.unpack(X), manifold.unpack(xi)
    D = Xf.S + xif.S
    Q_u, R_u = linalg.qr(Xf.U @ D + xif.U)
    Q_v, R_v = linalg.qr(Xf.V @ D.mT + xif.V)
    core = linalg.solve_right(R_u, D) @ R_v.mT
    return _finish(manifold, Q_u, core, Q_v)


def inverse_orthographic(manifold: FixedRank, X: Tensor, Y: Tensor) -> Tensor:
    """The tangent vector ξ at X with ``orthographic(X, ξ) = Y``: P_W(Y - W). 6 units.

    Exact wherever ``U_xᵀ Y V_x`` is invertible. It is what
    :meth:`~lrmanifold.FixedRank.inverse_retr` returns.
    """
    Xf, Yf = manifold.unpack(X), manifold.unpack(Y)
    a, b = Xf.U.mT @ Yf.U, Yf.V.mT @ Xf.V
    YV, YtU = Yf.U @ (Yf.S @ b), Yf.V @ (a @ Yf.S).mT
    M = a @ Yf.S @ b
    # Y - W is split before the subtraction: only the M block has a part of W in it.
    return manifold.pack(YV - Xf.U @ M, M - Xf.S, YtU - Xf.V @ M.mT)


@register("factored")
def factored(manifold: FixedRank, X: Tensor, xi: Tensor) -> Tensor:
    """Polar factors of U + U_p S⁻¹ and V + V_p S⁻ᵀ, core S + M: the CondLR step. First order.

    6 units, all in matrix products for small steps. One explicit Euler step of the factor ODE
    U̇ = U_p S⁻¹, Ṡ = M, V̇ = V_p S⁻ᵀ (mathematics 1). Polar, not QR, so that the result does not
    depend on the gauge. Its error grows with 1/σ_r: on ill-conditioned cores take ``ksl`` or
    ``bug``; on :class:`~lrmanifold.WellConditioned` σ_r is never small against ‖S‖.
    """
    Xf, xif = manifold.unpack(X), manifold.unpack(xi)
    U = linalg.polar(Xf.U + linalg.solve_right(xif.U, Xf.S))
    V = linalg.polar(Xf.V + linalg.solve_right(xif.V, Xf.S.mT))
    return _finish(manifold, U, Xf.S + xif.S, V)


@register("ksl")
def ksl(manifold: FixedRank, X: Tensor, xi: Tensor) -> Tensor:
    """Projector splitting for the increment ξ: K forwards, S backwards, L forwards. Second order.

    15 units, no inverse of S: as accurate for σ_r = 1e-12 as for 1. Exact if W + ξ has rank r.
    Sequential in K, S, L. Lubich and Oseledets 2014 (mathematics 7).
    """
    Xf, increment = manifold.unpack(X), _Increment(manifold, X, xi)
    U, S = _k_and_s(Xf.U @ Xf.S, increment.times(Xf.V))
    V, R = linalg.qr(Xf.V @ S.mT + increment.transposed_times(U), rank_deficient=True)
    return _finish(manifold, U, R.mT, V)


@register("strang")
def strang(manifold: FixedRank, X: Tensor, xi: Tensor) -> Tensor:
    """Symmetric projector splitting: K/2, S/2, L, S/2, K/2. Second order, 24 units.

    As an integrator of a flow its global order is 2 where that of ``ksl`` is 1 (mathematics 8); as
    a retraction both are second order. Exact if W + ξ has rank r.
    """
    Xf, increment = manifold.unpack(X), _Increment(manifold, X, xi)
    U, S = _k_and_s(Xf.U @ Xf.S, 0.5 * increment.times(Xf.V))
    V, R = linalg.qr(Xf.V @ S.mT + increment.transposed_times(U), rank_deficient=True)
    # The second half is the first one mirrored: S backwards, then K, both with the new V.
    half = 0.5 * increment.times(V)
    U, R = linalg.qr(U @ (R.mT - U.mT @ half) + half, rank_deficient=True)
    return _finish(manifold, U, R, V)


@register("bug")
def bug(manifold: FixedRank, X: Tensor, xi: Tensor) -> Tensor:
    """Basis update and Galerkin for the increment ξ: the r-dimensional unconventional integrator.

    Bases of K = (W + ξ)V and L = (W + ξ)ᵀU in parallel, then the core U₁ᵀ(W + ξ)V₁. Second order,
    10 units, no inverse of S, no backward substep; exact if W + ξ has rank r. Ceruti and Lubich
    2022 (mathematics 7).
    """
    Xf, xif = manifold.unpack(X), manifold.unpack(xi)
    D = Xf.S + xif.S
    U, V = _basis(Xf.U @ D + xif.U), _basis(Xf.V @ D.mT + xif.V)
    return _finish(manifold, U, _galerkin(Xf, xif, U, V), V)


@register("augmented_bug")
def augmented_bug(manifold: FixedRank, X: Tensor, xi: Tensor) -> Tensor:
    """BUG with the old bases kept: orth[U, K], orth[V, L], Galerkin of size 2r, truncation to r.

    Second order, 30 units. For a given increment W + ξ lies in the augmented spaces, so the result
    is that of ``svd``; the two differ when K, L and S see gradients of their own, in
    :class:`~lrmanifold.optim.DLRT`. Ceruti, Kusch and Lubich 2022.
    """
    Xf, xif = manifold.unpack(X), manifold.unpack(xi)
    D = Xf.S + xif.S
    U = _basis(joined(Xf.U, Xf.U @ D + xif.U, dim=-1))
    V = _basis(joined(Xf.V, Xf.V @ D.mT + xif.V, dim=-1))
    return _truncate(manifold, U, _galerkin(Xf, xif, U, V), V)


@register("parallel_bug")
def parallel_bug(manifold: FixedRank, X: Tensor, xi: Tensor) -> Tensor:
    """K, L and S updates all from the old point, core [[S̄, LᵀṼ], [ŨᵀK, 0]], truncation to r.

    Second order, 24 units, nothing sequential but the truncation. For a given tangent increment
    the zero block is exact and the result is again that of ``svd``. Ceruti, Kusch and Lubich 2024.
    """
    Xf, xif = manifold.unpack(X), manifold.unpack(xi)
    r, D = manifold.rank, Xf.S + xif.S
    K, L = Xf.U @ D + xif.U, Xf.V @ D.mT + xif.V
    # A positive diagonal of R makes the first r columns U and V themselves; the rest is new.
    U, V = _basis(joined(Xf.U, K, dim=-1)), _basis(joined(Xf.V, L, dim=-1))
    new_K, new_L = U[..., r:].mT @ K, V[..., r:].mT @ L
    zero = new_K.new_zeros(*new_K.shape[:-1], new_L.shape[-2])
    core = torch.cat((torch.cat((D, new_L.mT), -1), torch.cat((new_K, zero), -1)), -2)
    return _truncate(manifold, U, core, V)


_OWN = frozenset(_REGISTRY)
