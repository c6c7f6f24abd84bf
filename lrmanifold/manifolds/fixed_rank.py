"""The embedded manifold of matrices of fixed rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Literal

import geoopt
import torch
from geoopt.utils import size2shape
from torch import Tensor

from .. import linalg, retractions
from .._arguments import check_choice, check_integer, check_tensor, shown
from ..factors import Factors, change_of_base, frobenius, joined, pack, perp, unpack
from ..precision import STORAGE_DTYPES, check_float64, in_compute_dtype, without_autocast
from ._geodesic import geodesic
from ._hessian import ehess2rhess, lift

Gradient = Literal["factors", "probe"]
GRADIENTS = ("factors", "probe")


class FixedRank(geoopt.Manifold):
    r"""Matrices of rank r, :math:`\mathcal M_r = \{W \in R^{m \times n} : \mathrm{rank}\,W = r\}`.

    **Representation**: W = U S Vᵀ, U and V orthonormal, S a full invertible r x r matrix (never a
    diagonal: well-conditioned cores are where singular values coincide). A point is one packed
    tensor of shape ``(..., m + r + n, r)`` with the rows of U, S, V; the factors are views of it.
    Two packed tensors that differ by a gauge, (U A, AᵀS B, V B) with orthogonal A, B, are the same
    point; every method gives the same dense result for both.

    **Tangent space**: :math:`\xi = U M V^\top + U_p V^\top + U V_p^\top` with UᵀU_p = 0, VᵀV_p = 0,
    packed in the same way as (U_p, M, V_p). Dimension (m + n - r) r.

    **Metric**: Frobenius' of the dense matrices, which is the plain dot product of packed tensors.

    No method forms an m x n matrix, except those whose name says dense or ambient.

    Parameters
    ----------
    m, n : int
        Shape of the dense matrix.
    rank : int
        In 1..min(m, n).
    retraction : str or callable
        A name of :func:`lrmanifold.retractions.available`, or a function
        ``(manifold, X, xi) -> Y``. "svd", the metric projection of W + ξ, by default.
    gradient : {"factors", "probe"}
        What :meth:`egrad2rgrad` is given: the gradient with respect to (U, S, V), as autograd
        returns it; or (GV, UᵀGV, GᵀU), as the layers of :mod:`lrmanifold.nn` return it with
        ``gradient="probe"``. The latter needs no inverse of S, and a singular S counts as a point
        (mathematics 1).

    References
    ----------
    O. Koch and C. Lubich, *Dynamical low-rank approximation*, 2007; B. Vandereycken, *Low-rank
    matrix completion by Riemannian optimization*, 2013. mathematics 1 and 2.
    """

    name = "FixedRank"
    ndim = 2
    reversible = False

    def __init__(
        self,
        m: int,
        n: int,
        rank: int,
        *,
        retraction: str | Callable[..., Tensor] = "svd",
        gradient: Gradient = "factors",
    ) -> None:
        super().__init__()
        self.m, self.n = check_integer("m", m, low=1), check_integer("n", n, low=1)
        self.rank = self._check_rank(rank, min(self.m, self.n))
        check_choice("gradient", gradient, GRADIENTS)
        self.gradient: Gradient = gradient
        self.retraction = retraction
        self._retract = retractions.get(retraction)

    def extra_repr(self) -> str:
        return f"m={self.m}, n={self.n}, rank={self.rank}, retraction={self.retraction!r}"

    # -- representation

    @property
    def dim(self) -> int:
        """Dimension (m + n - r) r of the manifold."""
        return (self.m + self.n - self.rank) * self.rank

    @property
    def point_shape(self) -> tuple[int, int]:
        """Shape (m + r + n, r) of one packed point or tangent vector."""
        return (self.m + self.rank + self.n, self.rank)

    @staticmethod
    def _check_rank(rank: int, limit: int) -> int:
        try:
            rank = check_integer("rank", rank)
        except TypeError:
            message = f"rank must be an integer in 1..min(m, n) = {limit}, got {shown(rank)}"
            raise TypeError(message) from None
        if not 1 <= rank <= limit:
            raise ValueError(f"rank must be in 1..min(m, n) = {limit}, got {rank}")
        return rank

    def set_rank_(self, rank: int) -> FixedRank:
        """Change the rank in place, for all that hold this object: layer, weight, optimizer.

        The tensors must follow; :func:`lrmanifold.optim.resize` does both.
        """
        self.rank = self._check_rank(rank, min(self.m, self.n))
        return self

    def pack(self, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
        """One tensor (..., m + r + n, r) from U (..., m, r), S (..., r, r), V (..., n, r)."""
        r = self.rank
        for key, A, want in (("U", U, (self.m, r)), ("S", S, (r, r)), ("V", V, (self.n, r))):
            if tuple(A.shape[-2:]) != want:
                raise ValueError(
                    f"{key} must have shape (..., {want[0]}, {want[1]}), got {tuple(A.shape)}"
                )
        return pack(U, S, V)

    def unpack(self, X: Tensor) -> Factors:
        """Views ``Factors(U, S, V)`` of a packed tensor (point or tangent vector)."""
        if not isinstance(X, Tensor):
            raise TypeError(f"X must be a tensor, got {shown(X)}")
        if not X.is_floating_point():
            raise TypeError(f"X must be a real floating point tensor, got {shown(X)}")
        if tuple(X.shape[-2:]) != self.point_shape:
            raise ValueError(
                f"X must have shape (..., {self.point_shape[0]}, {self.point_shape[1]}) for "
                f"{self.name}(m={self.m}, n={self.n}, rank={self.rank}), got {tuple(X.shape)}"
            )
        return unpack(X, self.m, self.n)

    def to_dense(self, X: Tensor) -> Tensor:
        """The matrix U S Vᵀ, shape (..., m, n). Differentiable.

        With ``gradient="probe"`` the gradients are those that :meth:`egrad2rgrad` then expects.
        """
        U, S, V = self.unpack(X)
        if self.gradient == "probe" and X.requires_grad and torch.is_grad_enabled():
            U_, V_ = U.detach(), V.detach()
            return (U_ @ S + (U - U_)) @ V_.mT + U_ @ (V - V_).mT
        return U @ S @ V.mT

    def tangent_to_dense(self, X: Tensor, xi: Tensor) -> Tensor:
        """The matrix U M Vᵀ + U_p Vᵀ + U V_pᵀ, shape (..., m, n)."""
        U, _, V = self.unpack(X)
        U_p, M, V_p = self.unpack(xi)
        return (U @ M + U_p) @ V.mT + U @ V_p.mT

    def from_dense(self, W: Tensor) -> Tensor:
        """Nearest point of the set: truncated SVD in float64, then the projection of the core.

        Parameters
        ----------
        W : Tensor, shape (..., m, n)
            Of rank at least r (for :class:`WellConditioned`: not zero).

        Returns
        -------
        Tensor, shape (..., m + r + n, r), dtype of `W`

        Raises
        ------
        TypeError
            If `W` is complex or of integers, or on a device without float64.
        ValueError
            If the shape is wrong, `W` is not finite, or its rank is too small.
        """
        check_tensor("W", W, dtypes=STORAGE_DTYPES)
        check_float64("W", W)
        if tuple(W.shape[-2:]) != (self.m, self.n):
            raise ValueError(f"W must have shape (..., {self.m}, {self.n}), got {tuple(W.shape)}")
        U, s, Vh = linalg.svd(W.double())
        r = self.rank
        self._check_spectrum(s[..., :r], W.dtype)
        core = self.project_core(torch.diag_embed(s[..., :r]))
        return pack(U[..., :r], core, Vh[..., :r, :].mT).to(W.dtype)

    def _check_spectrum(self, s: Tensor, dtype: torch.dtype) -> None:
        if self.gradient == "probe":
            return  # no step divides by S, and singular cores are points
        eps = torch.finfo(dtype).eps
        if bool((s[..., -1] <= eps * s[..., 0]).any()):
            found = int((s > eps * s[..., :1]).sum(-1).min())
            raise ValueError(
                f"W must have rank at least {self.rank}, got numerical rank {found} in {dtype}"
            )

    @property
    def retraction_map(self) -> Callable[..., Tensor]:
        """The function behind `retraction`, ``(manifold, X, xi) -> Y``."""
        return self._retract

    @property
    def has_singular_points(self) -> bool:
        """Whether a singular core is a point: nothing divides by it, and no bound forbids it."""
        return self.gradient == "probe" and type(self) is FixedRank

    @property
    def bundle_key(self) -> Hashable:
        """What sets have in common whose weights an optimizer may move as one batch.

        Everything but the sizes that decides how a point moves. A subclass moves alone, as its
        object may differ in ways that only it knows, unless it declares a key of its own.
        """
        return (type(self), *self._kind()) if type(self) is FixedRank else id(self)

    def _kind(self) -> tuple[Hashable, ...]:
        return self._retract, self.gradient

    def project_core(self, S: Tensor, *, margin: float = 0.0) -> Tensor:
        """Project the core S (..., r, r) onto the set; every invertible core is in it here.

        `margin` asks for a point further inside where a bound was passed (see
        :func:`lrmanifold.linalg.spectral_clip`); here there is no bound.
        """
        return S

    def project_spectrum(self, s: Tensor) -> Tensor:
        """What :meth:`project_core` makes of the singular values `s`, (..., k), decreasing."""
        return s

    # -- checks

    def _check_shape(self, shape, name):
        ok, reason = super()._check_shape(shape, name)
        if ok and tuple(shape[-2:]) != self.point_shape:
            return False, (
                f"`{name}` must have shape (..., {self.point_shape[0]}, {self.point_shape[1]}) = "
                f"(..., m + r + n, r), got {tuple(shape)}"
            )
        return ok, reason

    @without_autocast
    def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
        if not torch.isfinite(x).all():
            return False, "`x` holds NaN or Inf"
        if x.numel() == 0:
            return True, None
        X = self.unpack(x.to(linalg.compute_dtype(x.dtype)))
        for key, Q in (("U", X.U), ("V", X.V)):
            defect = self._orthonormality_defect(Q).max().item()
            if defect > atol + rtol:
                return (
                    False,
                    f"factor {key} is not orthonormal: max |{key}ᵀ{key} - I| = {defect:.2e}",
                )
        s = linalg.svdvals(X.S)
        if self.has_singular_points:
            return True, None
        # below the normal numbers of the dtype that S is inverted in, not of its storage
        if bool((s[..., -1] <= torch.finfo(s.dtype).tiny).any()):
            hint = "; with gradient='probe' it would be a point" if type(self) is FixedRank else ""
            size = s.min().item()
            return False, f"core S is singular (smallest singular value {size:.2e}){hint}"
        return self._check_core(s, atol=atol, rtol=rtol)

    def _check_core(self, s, *, atol, rtol):
        return True, None

    @without_autocast
    def _check_vector_on_tangent(self, x, u, *, atol=1e-5, rtol=1e-5):
        if not torch.isfinite(u).all():
            return False, "`u` holds NaN or Inf"
        X, xi = (self.unpack(z.to(linalg.compute_dtype(z.dtype))) for z in (x, u))
        for key, Q, P in (("U", X.U, xi.U), ("V", X.V, xi.V)):
            defect = (Q.mT @ P).abs().amax((-2, -1))
            if bool((defect > atol + rtol * frobenius(P)).any()):
                return False, (
                    f"block {key}_p is not orthogonal to {key}: "
                    f"max |{key}ᵀ{key}_p| = {defect.max().item():.2e}"
                )
        return True, None

    @staticmethod
    def _orthonormality_defect(Q: Tensor) -> Tensor:
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return (linalg.gram(Q) - eye).abs().amax((-2, -1))

    # -- measurements

    @in_compute_dtype
    def drift(self, X: Tensor) -> Tensor:
        """max(|UᵀU - I|, |VᵀV - I|) elementwise, shape ``X.shape[:-2]``."""
        U, _, V = self.unpack(X)
        return torch.maximum(self._orthonormality_defect(U), self._orthonormality_defect(V))

    def svdvals(self, X: Tensor) -> Tensor:
        """The r singular values in decreasing order, shape (..., r), from the core."""
        return linalg.svdvals(self.unpack(X).S)

    def cond(self, X: Tensor) -> Tensor:
        """Condition number σ_max/σ_min of the point (its pseudo-inverse sense), shape (...)."""
        return linalg.condition_number(self.unpack(X).S)

    @in_compute_dtype
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Frobenius distance ‖X - Y‖ of the dense matrices (chordal, not geodesic).

        From the factors, by QR of [U_x U_y] and [V_x V_y]: O((m+n) r²), and without the
        cancellation of ‖X‖² + ‖Y‖² - 2⟨X, Y⟩. `keepdim` keeps the last two dimensions. No
        derivative exists at x = y: it is NaN there.
        """
        X, Y = self.unpack(x), self.unpack(y)
        _, R_u = linalg.qr(joined(X.U, Y.U, dim=-1), rank_deficient=True)
        _, R_v = linalg.qr(joined(X.V, Y.V, dim=-1), rank_deficient=True)
        r = self.rank
        small = R_u[..., :r] @ X.S @ R_v[..., :r].mT - R_u[..., r:] @ Y.S @ R_v[..., r:].mT
        return frobenius(small, keepdim=keepdim)

    # -- tangent space

    @in_compute_dtype
    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim=False) -> Tensor:
        """Dot product of packed vectors = Frobenius product of the dense ones, shape (...).

        In float16 the sum is made in float32, but it is 0 or Inf where it is beyond float16's
        range, 6e-8 to 65504: for sizes take :meth:`norm`, which is not squared.
        """
        return (u * (u if v is None else v)).sum((-2, -1), keepdim=keepdim)

    @in_compute_dtype
    def norm(self, x: Tensor, u: Tensor, *, keepdim=False) -> Tensor:
        """Frobenius norm of the dense vector, shape (...)."""
        return frobenius(u, keepdim=keepdim)

    @in_compute_dtype
    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """The inner product of each block U_p, M, V_p, repeated over the block's entries.

        What geoopt's adaptive optimizers divide by: one scalar a block keeps a tangent vector
        tangent, and lets the three blocks have scales of their own. Shape (..., m + r + n, r).
        """
        product = self.unpack(u * (u if v is None else v))
        return pack(*(b.sum((-2, -1), keepdim=True).expand_as(b) for b in product))

    @in_compute_dtype
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Nearest packed tangent vector: U_p - U UᵀU_p, M, V_p - V VᵀV_p; 4 (m+n) r² flops."""
        U, _, V = self.unpack(x)
        U_p, M, V_p = self.unpack(u)
        return pack(perp(U, U_p), M, perp(V, V_p))

    @in_compute_dtype
    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        r"""Packed Riemannian gradient from what autograd returns for the packed tensor.

        M = g_S, U_p = (I - UUᵀ) g_U S⁻ᵀ, V_p = (I - VVᵀ) g_V S⁻¹ (mathematics 1): the projection
        P_W G of the dense gradient, which is never formed. 6 (m+n) r² flops. In float32 the solve
        loses ``eps cond(S)``; with ``gradient="probe"`` there is none, U_p = (I - UUᵀ) GV. A decay
        `wd * X` added to `u`, as geoopt's optimizers do, acts on S alone.

        Raises
        ------
        torch.linalg.LinAlgError
            On the CPU, if S is exactly singular.
        """
        U, S, V = self.unpack(x)
        g_U, g_S, g_V = self.unpack(u)
        if self.gradient == "probe":
            return pack(perp(U, g_U), g_S, perp(V, g_V))
        U_p = linalg.solve_right(perp(U, g_U), S.mT)
        V_p = linalg.solve_right(perp(V, g_V), S)
        return pack(U_p, g_S, V_p)

    @in_compute_dtype
    def lift(self, x: Tensor, xi: Tensor) -> Tensor:
        """Packed velocity (U_p S⁻¹, M, V_p S⁻ᵀ) of the factors that moves the matrix along ξ.

        The horizontal lift: what to differentiate a function of the packed tensor along, to get its
        derivative along the tangent vector `xi`.
        """
        return pack(*lift(self.unpack(x), self.unpack(xi)))

    @in_compute_dtype
    def ehess2rhess(self, x: Tensor, egrad: Tensor, ehess: Tensor, xi: Tensor) -> Tensor:
        r"""Riemannian Hessian-vector product, packed, in factored form: O((m+n) r²).

        P_W(∇²f[ξ]) plus the curvature term, with blocks (I - UUᵀ) G V_p S⁻ᵀ and
        (I - VVᵀ) GᵀU_p S⁻¹ (Vandereycken 2013, proposition 2.3; mathematics 3, L3.6).

        Parameters
        ----------
        x : Tensor, shape (..., m + r + n, r)
        egrad : Tensor
            Gradient with respect to the packed tensor, as autograd returns it.
        ehess : Tensor
            Derivative of `egrad` along ``lift(x, xi)``: a Hessian-vector product of the function of
            the packed tensor.
        xi : Tensor
            Packed tangent vector at `x`.

        Returns
        -------
        Tensor, shape of `x`
        """
        if self.gradient == "probe":
            raise ValueError("ehess2rhess needs a manifold with gradient='factors', got 'probe'")
        return pack(
            *ehess2rhess(self.unpack(x), self.unpack(egrad), self.unpack(ehess), self.unpack(xi))
        )

    @in_compute_dtype
    def project_ambient(self, X: Tensor, Z: Tensor) -> Tensor:
        """Orthogonal projection P_W Z of a dense matrix (..., m, n) to a packed tangent vector."""
        U, _, V = self.unpack(X)
        check_tensor("Z", Z)
        if tuple(Z.shape[-2:]) != (self.m, self.n):
            raise ValueError(f"Z must have shape (..., {self.m}, {self.n}), got {tuple(Z.shape)}")
        ZV, ZtU = Z @ V, Z.mT @ U
        M = U.mT @ ZV
        return pack(perp(U, ZV, M), M, perp(V, ZtU, M.mT))

    @in_compute_dtype
    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport by orthogonal projection of the dense vector onto the tangent space at `y`."""
        return pack(*change_of_base(self.unpack(x), self.unpack(v), self.unpack(y)))

    # -- moving

    @in_compute_dtype
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The retraction chosen at construction; see :mod:`lrmanifold.retractions`."""
        return self._retract(self, x, u)

    @in_compute_dtype
    def inverse_retr(self, x: Tensor, y: Tensor) -> Tensor:
        """The tangent vector P_W(Y - W) at `x`: the exact inverse of the orthographic retraction.

        For every second-order retraction it is the inverse up to O(‖Y - W‖³).
        """
        return retractions.inverse_orthographic(self, x, y)

    @in_compute_dtype
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic of the embedded metric after unit time, integrated to roundoff.

        There is no closed form. The ODE of mathematics 3 (Ẅ = 2 U_p S⁻¹ V_pᵀ) is solved in the
        2r-dimensional spaces that the geodesic never leaves, by the extrapolated midpoint rule in
        float64, steps doubled until nothing changes. M_r is not complete: a geodesic that loses
        rank on its way raises :class:`~lrmanifold.GeometryError`.
        """
        y = geodesic(self.unpack(x), self.unpack(u))
        return pack(y.U, self.project_core(y.S), y.V)

    @in_compute_dtype
    def projx(self, x: Tensor) -> Tensor:
        """Bring a drifted packed tensor back without changing its dense matrix.

        U = Q_u P_u, V = Q_v P_v (polar), S becomes P_u S P_vᵀ and is then projected.
        """
        U, S, V = self.unpack(x)
        Q_u, Q_v = linalg.polar(U), linalg.polar(V)
        return pack(Q_u, self.project_core((Q_u.mT @ U) @ S @ (V.mT @ Q_v)), Q_v)

    # -- points

    def _full_shape(self, size: tuple) -> tuple[int, ...]:
        shape = tuple(size2shape(*size)) if size else self.point_shape
        self._assert_check_shape(shape, "x")
        return shape

    def random(
        self, *size, dtype=None, device=None, generator: torch.Generator | None = None
    ) -> geoopt.ManifoldTensor:
        """Random points: Haar-uniform U and V, and the projection of a Gaussian core, E‖S‖² = r.

        Here that leaves E‖W‖² = r; the sets of :class:`WellConditioned` bring it to less, or to
        their `scale`.

        Parameters
        ----------
        *size : int
            The packed shape (..., m + r + n, r); one point if nothing is given.
        """
        *lead, _, r = self._full_shape(size)
        options = {"dtype": dtype, "device": device, "generator": generator}
        U = linalg.orthonormalize(torch.randn(*lead, self.m, r, **options))
        V = linalg.orthonormalize(torch.randn(*lead, self.n, r, **options))
        S = self.project_core(torch.randn(*lead, r, r, **options) / math.sqrt(r))
        return geoopt.ManifoldTensor(pack(U, S, V), manifold=self)

    def origin(self, *size, dtype=None, device=None, seed: int | None = 42):
        """The first r columns of the identities with S = I; `seed` is geoopt's, without effect."""
        *lead, _, r = self._full_shape(size)
        eyes = (torch.eye(k, r, dtype=dtype, device=device) for k in (self.m, r, self.n))
        X = pack(*eyes).expand(*lead, *self.point_shape).clone()
        return geoopt.ManifoldTensor(X, manifold=self)
