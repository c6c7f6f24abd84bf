"""The Stiefel manifold of orthonormal frames, with retractions that cost O(n r²)."""

from __future__ import annotations

from typing import Literal

import geoopt
import torch
from geoopt.utils import size2shape
from torch import Tensor

from .. import linalg
from .._arguments import check_choice
from ..factors import frobenius, joined
from ..precision import in_compute_dtype, without_autocast

StiefelRetraction = Literal["polar", "qr", "cayley"]
_RETRACTIONS = ("polar", "qr", "cayley")


def _sym(A: Tensor) -> Tensor:
    return 0.5 * (A + A.mT)


class Stiefel(geoopt.Manifold):
    r"""Orthonormal frames :math:`\mathrm{St}(n, r) = \{X \in R^{n \times r} : X^\top X = I\}`.

    **Tangent space** :math:`\{\xi : X^\top \xi + \xi^\top X = 0\}`. **Metric**: Euclidean,
    :math:`\langle \xi, \eta \rangle = \mathrm{tr}(\xi^\top \eta)`.

    **Retractions**, all O(n r²), none solves an n x n system:

    ``"polar"``
        The polar factor of X + ξ; second order for this metric, independent of the frame. 4 n r²
        flops for small steps, more than 12 n r² for large ones.
    ``"qr"``
        Q of a QR of X + ξ; first order (second order as a subspace). 8 n r² flops.
    ``"cayley"``
        The Cayley transform, through a 2r x 2r system; second order for the *canonical* metric,
        and for this one on horizontal vectors (Xᵀξ = 0). 24 n r² flops.

    Points have shape (..., n, r) with n >= r; leading dimensions are a batch.

    Parameters
    ----------
    retraction : {"polar", "qr", "cayley"}

    References
    ----------
    A. Edelman, T. A. Arias, S. T. Smith, *The geometry of algorithms with orthogonality
    constraints*, 1998; P.-A. Absil, R. Mahony, R. Sepulchre, *Optimization algorithms on matrix
    manifolds*, 2008. mathematics 2.

    See Also
    --------
    geoopt.EuclideanStiefel : the same set and metric with an n x r QR retraction.
    """

    name = "Stiefel"
    ndim = 2
    reversible = False

    def __init__(self, retraction: StiefelRetraction = "polar") -> None:
        super().__init__()
        check_choice("retraction", retraction, _RETRACTIONS)
        self.retraction = retraction

    def extra_repr(self) -> str:
        return f"retraction={self.retraction!r}"

    # -- checks

    def _check_shape(self, shape, name):
        ok, reason = super()._check_shape(shape, name)
        if ok and shape[-1] > shape[-2]:
            return (
                False,
                f"`{name}` needs n >= r, got n = {shape[-2]} rows, r = {shape[-1]} columns",
            )
        return ok, reason

    def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
        if not torch.isfinite(x).all():
            return False, "`x` holds NaN or Inf"
        drift = self.drift(x).max().item() if x.numel() else 0.0
        if drift > atol + rtol:
            return False, f"columns are not orthonormal: max |XᵀX - I| = {drift:.2e}"
        return True, None

    @without_autocast
    def _check_vector_on_tangent(self, x, u, *, atol=1e-5, rtol=1e-5):
        if not torch.isfinite(u).all():
            return False, "`u` holds NaN or Inf"
        x, u = (z.to(linalg.compute_dtype(z.dtype)) for z in (x, u))
        defect = 2.0 * _sym(x.mT @ u).abs().amax((-2, -1))
        size = frobenius(u)
        if bool((defect > atol + rtol * size).any()):
            return False, f"Xᵀu is not skew: max |Xᵀu + uᵀX| = {defect.max().item():.2e}"
        return True, None

    @in_compute_dtype
    def drift(self, X: Tensor) -> Tensor:
        """max |XᵀX - I| of each point, shape ``X.shape[:-2]``."""
        eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
        return (linalg.gram(X) - eye).abs().amax((-2, -1))

    # -- geometry

    @in_compute_dtype
    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim=False) -> Tensor:
        """Euclidean inner product tr(uᵀv), shape (...) or (..., 1, 1) with `keepdim`.

        In float16 it is 0 or Inf beyond that range, unlike :meth:`norm`.
        """
        return (u * (u if v is None else v)).sum((-2, -1), keepdim=keepdim)

    @in_compute_dtype
    def norm(self, x: Tensor, u: Tensor, *, keepdim=False) -> Tensor:
        """Frobenius norm, shape (...) or (..., 1, 1) with `keepdim`."""
        return frobenius(u, keepdim=keepdim)

    @in_compute_dtype
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Orthogonal projection u - X sym(Xᵀu) onto the tangent space."""
        return u - x @ _sym(x.mT @ u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Riemannian gradient: the projection of the Euclidean one."""
        return self.proju(x, u)

    @without_autocast
    def projx(self, x: Tensor) -> Tensor:
        """Nearest frame: the polar factor. ValueError for a rank-deficient `x` on the CPU."""
        return linalg.polar(x)

    @in_compute_dtype
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retraction chosen at construction; see the class for orders and costs."""
        if self.retraction == "polar":
            return linalg.polar(x + u)
        if self.retraction == "qr":
            return linalg.orthonormalize(x + u)
        return self._cayley(x, u)

    @staticmethod
    def _cayley(x: Tensor, u: Tensor) -> Tensor:
        """(I - W/2)⁻¹(I + W/2) X with W = P u Xᵀ - X uᵀ P, P = I - XXᵀ/2 (Wen-Yin 2013)."""
        r = x.shape[-1]
        Pu = u - 0.5 * (x @ (x.mT @ u))
        # W = A Bᵀ of rank 2r; Sherman-Morrison-Woodbury leaves a 2r x 2r system.
        A, B = joined(Pu, x, dim=-1), joined(x, -Pu, dim=-1)
        eye = torch.eye(2 * r, dtype=x.dtype, device=x.device)
        small, _ = torch.linalg.solve_ex(eye - 0.5 * (B.mT @ A), B.mT @ x)
        y = x + A @ small
        # The transform keeps XᵀX as it is, rounding included: remove the drift of this step.
        return linalg.polar(y)

    @in_compute_dtype
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesic of the Euclidean metric (Edelman, Arias, Smith 1998, section 2.2), O(n r²)."""
        dtype, r = x.dtype, x.shape[-1]
        x, u = x.double(), u.double()  # the blocks have norm ‖u‖², whose rounding would be seen
        a, s = x.mT @ u, u.mT @ u
        a = 0.5 * (a - a.mT)
        eye = torch.eye(r, dtype=x.dtype, device=x.device).expand_as(a)
        block = joined(joined(a, -s, dim=-1), joined(eye, a, dim=-1), dim=-2)
        y = joined(x, u, dim=-1) @ torch.linalg.matrix_exp(block)[..., :r]
        return (y @ torch.linalg.matrix_exp(-a)).to(dtype)

    @in_compute_dtype
    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport by projection onto the tangent space at `y`."""
        return self.proju(y, v)

    # -- points

    def random(
        self, *size, dtype=None, device=None, generator: torch.Generator | None = None
    ) -> geoopt.ManifoldTensor:
        """Haar-uniform frames of shape `size` = (..., n, r).

        The Q of a QR with positive diagonal of a Gaussian matrix (Mezzadri 2007).
        """
        shape = size2shape(*size)
        self._assert_check_shape(shape, "x")
        gauss = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        return geoopt.ManifoldTensor(linalg.orthonormalize(gauss), manifold=self)

    def origin(self, *size, dtype=None, device=None, seed: int | None = 42):
        """The first r columns of the identity; `seed` is geoopt's and has no effect."""
        shape = size2shape(*size)
        self._assert_check_shape(shape, "x")
        eye = torch.eye(*shape[-2:], dtype=dtype, device=device)
        return geoopt.ManifoldTensor(eye.expand(shape).clone(), manifold=self)
