"""pymanopt's optimizers on our manifolds, and points and tangents in either library's form.

Needs the package pymanopt (extra ``[test]`` or ``[bench]``).

Examples
--------
>>> manifold = lrmanifold.FixedRank(60, 50, 5)
>>> space = PackedFixedRank(manifold)
>>> @pymanopt.function.pytorch(space)
... def cost(X):
...     return 0.5 * (mask * (manifold.to_dense(X) - A)).square().sum()
>>> problem = pymanopt.Problem(space, cost)
>>> result = pymanopt.optimizers.TrustRegions().run(problem)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pymanopt.manifolds.fixed_rank import _FixedRankPoint, _FixedRankTangentVector
from pymanopt.manifolds.manifold import RiemannianSubmanifold
from torch import Tensor

from .._arguments import check_instance, check_tensor, shown
from ..linalg import svd
from ..manifolds import FixedRank
from ..precision import storage_tolerance

Array = np.ndarray[Any, Any]


class PackedFixedRank(RiemannianSubmanifold):
    """Our :class:`~lrmanifold.FixedRank` as a pymanopt manifold of packed float64 arrays.

    Points and tangent vectors are single arrays of shape (m + r + n, r), so costs are written in
    torch with ``manifold.to_dense`` or ``manifold.unpack`` and differentiated by pymanopt's PyTorch
    backend. Unlike pymanopt's own ``FixedRankEmbedded`` it works with trust regions (it has a
    Hessian), and its gradient is finite where singular values coincide.

    Parameters
    ----------
    manifold : FixedRank
        Also a :class:`~lrmanifold.WellConditioned`: every retraction then ends in the set.
    """

    def __init__(self, manifold: FixedRank) -> None:
        check_instance("manifold", manifold, FixedRank, "an lrmanifold.FixedRank")
        if manifold.gradient != "factors":
            raise ValueError(
                f"manifold must have gradient='factors', what costs in torch return, "
                f"got {manifold.gradient!r}"
            )
        self.manifold = manifold
        name = f"{manifold.name} of {manifold.m} x {manifold.n} matrices of rank {manifold.rank}"
        super().__init__(name, manifold.dim)

    @property
    def typical_dist(self) -> float:
        """pymanopt's scale for trust regions: √dim, of the size of ‖W‖ with entries near 1."""
        return float(np.sqrt(self.manifold.dim))

    def inner_product(self, point, tangent_vector_a, tangent_vector_b):
        """Dot product of packed arrays."""
        return float(np.vdot(tangent_vector_a, tangent_vector_b))

    def norm(self, point, tangent_vector):
        """Euclidean norm of the packed array."""
        return float(np.linalg.norm(tangent_vector))

    def projection(self, point, vector):
        """Nearest packed tangent vector."""
        return _numpy(self.manifold.proju(_torch(point), _torch(vector)))

    to_tangent_space = projection

    def embedding(self, point, tangent_vector):
        """Velocity of the factors: the direction that Hessians are taken along."""
        return _numpy(self.manifold.lift(_torch(point), _torch(tangent_vector)))

    def euclidean_to_riemannian_gradient(self, point, euclidean_gradient):
        """:meth:`FixedRank.egrad2rgrad`."""
        return _numpy(self.manifold.egrad2rgrad(_torch(point), _torch(euclidean_gradient)))

    def euclidean_to_riemannian_hessian(
        self, point, euclidean_gradient, euclidean_hessian, tangent_vector
    ):
        """:meth:`FixedRank.ehess2rhess`."""
        arrays = (point, euclidean_gradient, euclidean_hessian, tangent_vector)
        return _numpy(self.manifold.ehess2rhess(*map(_torch, arrays)))

    def retraction(self, point, tangent_vector):
        """The retraction of the manifold."""
        return _numpy(self.manifold.retr(_torch(point), _torch(tangent_vector)))

    def exp(self, point, tangent_vector):
        """Geodesic, by integration."""
        return _numpy(self.manifold.expmap(_torch(point), _torch(tangent_vector)))

    def transport(self, point_a, point_b, tangent_vector_a):
        """Transport by projection."""
        tensors = map(_torch, (point_a, point_b, tangent_vector_a))
        return _numpy(self.manifold.transp(*tensors))

    def dist(self, point_a, point_b):
        """Frobenius distance of the matrices (chordal)."""
        return float(self.manifold.dist(_torch(point_a), _torch(point_b)))

    def random_point(self):
        """A random point; drawn with numpy's global generator, as pymanopt does."""
        return _numpy(self.manifold.random(dtype=torch.float64, generator=_generator()))

    def random_tangent_vector(self, point):
        """A uniformly random tangent vector of norm 1."""
        vector = self.projection(point, np.random.normal(size=point.shape))
        return vector / np.linalg.norm(vector)

    def zero_vector(self, point):
        """The zero tangent vector."""
        return np.zeros_like(point)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.randint(2**31)))


def _torch(array: Any) -> Tensor:
    found = np.asarray(array)
    if found.dtype.kind not in "fiu":
        raise TypeError(f"points and vectors must be arrays of real numbers, got {found.dtype}")
    # float64, or a start in float32 would not go with its gradients; a copy, to have one to write
    return torch.from_numpy(np.array(found, dtype=np.float64, order="C"))


def _three(name: str, parts: Any, words: str) -> list[Tensor]:
    try:
        u, s, v = parts
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a triple {words}, got {shown(parts)}") from None
    return [_torch(array) for array in (u, s, v)]


def _numpy(X: Tensor) -> Array:
    # A plain tensor first: geoopt's subclass has no numpy() of its own.
    return X.detach().as_subclass(torch.Tensor).cpu().double().numpy().copy()


def point_to_pymanopt(manifold: FixedRank, X: Tensor) -> _FixedRankPoint:
    """The point (u, s, vt) of pymanopt's ``FixedRankEmbedded`` for a packed point, one matrix.

    Shapes (m, r), (r,), (r, n), float64.

    Raises
    ------
    ValueError
        If `X` is no point of `manifold`, to the rounding of its dtype.
    """
    (U, _, V), s, P, Qh = _gauge(manifold, X)
    return _FixedRankPoint(_numpy(U @ P), _numpy(s), _numpy((V @ Qh.mT).mT))


def point_from_pymanopt(manifold: FixedRank, point: Any) -> Tensor:
    """The packed float64 tensor for a point (u, s, vt) of pymanopt's ``FixedRankEmbedded``.

    Raises
    ------
    ValueError
        If it is no point of `manifold`: of other sizes, with bases that are not orthonormal, or,
        for a :class:`~lrmanifold.WellConditioned`, with a condition number above the bound.
        Convert it for a :class:`~lrmanifold.FixedRank` then, and project: ``manifold.projx(X)``.
    """
    check_instance("manifold", manifold, FixedRank, "an lrmanifold.FixedRank")
    u, s, vt = _three("point", point, "(u, s, vt)")
    X = manifold.pack(u, torch.diag(s), vt.mT)
    ok, why = manifold.check_point_on_manifold(X, explain=True)
    if not ok:
        raise ValueError(
            f"point must be on {manifold.name}, but {why}: convert it for lrmanifold.FixedRank"
            f"({manifold.m}, {manifold.n}, {manifold.rank}) and bring it here by manifold.projx"
        )
    return X


def tangent_to_pymanopt(manifold: FixedRank, X: Tensor, xi: Tensor) -> _FixedRankTangentVector:
    """The tangent vector (Up, M, Vp) at ``point_to_pymanopt(manifold, X)``.

    Raises
    ------
    ValueError
        If `xi` is not tangent at `X`, to the rounding of its dtype: ``manifold.proju`` makes it so.
    """
    _, _, P, Qh = _gauge(manifold, X)
    check_tensor("xi", xi)
    if xi.shape != X.shape:
        raise ValueError(f"xi must have the shape of X, {tuple(X.shape)}, got {tuple(xi.shape)}")
    tol = max(storage_tolerance(xi.dtype), storage_tolerance(X.dtype))
    wide, at = xi.detach().double(), X.detach().double()
    ok, why = manifold.check_vector_on_tangent(
        at, wide, ok_point=True, explain=True, atol=tol, rtol=tol
    )
    if not ok:
        raise ValueError(f"xi must be tangent at X, but {why}")
    U_p, M, V_p = manifold.unpack(wide)
    return _FixedRankTangentVector(_numpy(U_p @ Qh.mT), _numpy(P.mT @ M @ Qh.mT), _numpy(V_p @ P))


def tangent_from_pymanopt(manifold: FixedRank, X: Tensor, vector: Any) -> Tensor:
    """The packed tangent vector at `X` for one at ``point_to_pymanopt(manifold, X)``.

    Raises
    ------
    ValueError
        If it is not tangent there, as one at another point is not.
    """
    _, _, P, Qh = _gauge(manifold, X)
    Up, M, Vp = _three("vector", vector, "(Up, M, Vp)")
    xi = manifold.pack(Up @ Qh, P @ M @ Qh, Vp @ P.mT)
    ok, why = manifold.check_vector_on_tangent(X.detach().double(), xi, ok_point=True, explain=True)
    if not ok:
        raise ValueError(f"vector must be tangent at X, but {why}")
    return xi


def _gauge(manifold: FixedRank, X: Tensor):
    """The rotations P, Q with S = P diag(s) Qᵀ: pymanopt's bases are U P and V Q."""
    check_instance("manifold", manifold, FixedRank, "an lrmanifold.FixedRank")
    check_tensor("X", X)
    if X.ndim != 2:
        raise ValueError(f"X must be one point, without batch dimensions, got {tuple(X.shape)}")
    factors = manifold.unpack(X.detach().double())
    tol = storage_tolerance(X.dtype)
    ok, why = manifold.check_point_on_manifold(X.detach(), explain=True, atol=tol, rtol=tol)
    if not ok:
        raise ValueError(f"X must be on {manifold.name}, but {why}")
    P, s, Qh = svd(factors.S)
    return factors, s, P, Qh
