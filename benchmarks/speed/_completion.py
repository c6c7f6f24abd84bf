"""Matrix completion from few entries, and three ways to solve it with the same sparse kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import geoopt
import numpy as np
import pymanopt
import scipy.sparse
import scipy.sparse.linalg
import torch
from pymanopt.manifolds.fixed_rank import _FixedRankTangentVector
from torch import Tensor

import lrmanifold as lrm
from lrmanifold.interop.pymanopt import PackedFixedRank, point_to_pymanopt

Array = Any
TOLERANCE = 1e-6


class Reached(Exception):  # noqa: N818  (no error: the aim)
    """The residual is small enough."""


class Completion:
    """½ ‖P_Ω(L Rᵀ - A)‖² for a random A of rank r, Ω of `oversampling` times dim entries.

    The sparse residual is one gather of rows a factor and one row-wise dot product; its two
    products with tall matrices go through CSR matrices of A and of Aᵀ whose pattern is built once.
    All methods use it, count its calls, and stop at the first residual below the tolerance, in
    whichever line search that may be.
    """

    def __init__(
        self, size: int = 2000, rank: int = 10, oversampling: float = 5.0, seed: int = 0
    ) -> None:
        self.manifold = lrm.FixedRank(size, size, rank, retraction="factored")
        rng = np.random.default_rng(seed)
        count = min(size * size, round(oversampling * self.manifold.dim))
        flat = np.sort(rng.choice(size * size, count, replace=False))
        self.rows, self.columns = np.divmod(flat, size)
        left, right = (rng.standard_normal((size, rank)) for _ in range(2))
        self.known = np.einsum("ij,ij->i", left[self.rows], right[self.columns])
        self.scale = float(np.linalg.norm(self.known))
        self.density = count / size**2
        self._order = np.lexsort((self.rows, self.columns))
        shape = (size, size)
        self._csr = scipy.sparse.csr_matrix((self.known, (self.rows, self.columns)), shape)
        self._transposed = self._csr.T.tocsr()
        X = self.manifold.pack(*self._leading(rank))
        self.start = X.contiguous()
        self.calls, self.residual = 0, float("inf")
        self._key: Array = None
        self._latest: Array = None

    def _leading(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The truncated SVD of P_Ω A, scaled up to the size of A: everybody's start."""
        u, s, vt = scipy.sparse.linalg.svds(self._csr, k=rank, random_state=0)
        core = np.diag(s / self.density)
        return torch.from_numpy(u.copy()), torch.from_numpy(core), torch.from_numpy(vt.T.copy())

    def residuals(self, key: Array, left: Array, right: Array) -> Array:
        """P_Ω(left rightᵀ - A) as a vector; raises :class:`Reached`.

        pymanopt asks for the cost twice and then for the gradient at the same point: `key`, the
        very array of the point, says so, and the residual is computed once.
        """
        if key is self._key:
            return self._latest
        found = np.einsum("ij,ij->i", left[self.rows], right[self.columns])
        found -= self.known
        self.calls += 1
        self.residual = float(np.linalg.norm(found)) / self.scale
        if self.residual <= TOLERANCE:
            raise Reached
        self._key, self._latest = key, found
        return found

    def products(self, residuals: Array, U: Array, V: Array) -> tuple[Array, Array]:
        """G V and GᵀU for the sparse G of these residuals."""
        self._csr.data = residuals
        self._transposed.data = residuals[self._order]
        return self._csr @ V, self._transposed @ U

    def solve(self, method: Callable[[Completion], Any]) -> dict[str, Any]:
        """Run a method from the common start; how far it came, and in how many residuals."""
        self.calls, self.residual, reached = 0, float("inf"), False
        self._key = None
        try:
            method(self)
        except Reached:
            reached = True
        return {"reached": reached, "residual": self.residual, "residuals": self.calls}


def pymanopt_own(problem: Completion, iterations: int = 2000) -> None:
    """pymanopt's FixedRankEmbedded in its conjugate gradients, sparse cost and gradient."""
    M = problem.manifold
    space = pymanopt.manifolds.FixedRankEmbedded(M.m, M.n, M.rank)

    @pymanopt.function.numpy(space)
    def cost(u, s, vt):
        residuals = problem.residuals(u, u * s, vt.T)
        return 0.5 * float(residuals @ residuals)

    @pymanopt.function.numpy(space)
    def gradient(u, s, vt):
        v = np.ascontiguousarray(vt.T)
        ZV, ZtU = problem.products(problem.residuals(u, u * s, v), u, v)
        core = u.T @ ZV
        return _FixedRankTangentVector(ZV - u @ core, core, ZtU - v @ core.T)

    start = point_to_pymanopt(M, problem.start)
    _conjugate_gradients(space, cost, gradient, start, iterations)


def ours_in_pymanopt(problem: Completion, iterations: int = 2000) -> None:
    """Our manifold in pymanopt's conjugate gradients, the same cost and gradient packed."""
    M = problem.manifold
    space = PackedFixedRank(M)

    def parts(X: Array) -> tuple[Array, Array, Array]:
        return X[: M.m], X[M.m : M.m + M.rank], X[M.m + M.rank :]

    @pymanopt.function.numpy(space)
    def cost(X):
        U, S, V = parts(X)
        residuals = problem.residuals(X, U @ S, V)
        return 0.5 * float(residuals @ residuals)

    @pymanopt.function.numpy(space)
    def gradient(X):
        U, S, V = parts(X)
        ZV, ZtU = problem.products(problem.residuals(X, U @ S, V), U, V)
        core = U.T @ ZV
        return np.concatenate((ZV - U @ core, core, ZtU - V @ core.T))

    _conjugate_gradients(space, cost, gradient, problem.start.numpy().copy(), iterations)


def _conjugate_gradients(space, cost, gradient, start, iterations: int) -> None:
    stop = {"min_gradient_norm": 0.0, "min_step_size": 0.0, "max_time": 600}
    optimizer = pymanopt.optimizers.ConjugateGradient(
        verbosity=0, max_iterations=iterations, **stop
    )
    task = pymanopt.Problem(space, cost, riemannian_gradient=gradient)
    optimizer.run(task, initial_point=start)


def condlr(
    problem: Completion, *, lr: float = 0.7, momentum: float = 0.4, iterations: int = 5000
) -> None:
    """CondLR with a fixed rate `lr` / density and momentum; gradients of the packed tensor.

    P_Ω is about density times the identity on tangent vectors, so lr = 1 is a Newton step's size.
    Rates of 0.7 to 1 with momentum 0.3 to 0.5 take 37 to 41 steps on 2000 x 2000.
    """
    M = problem.manifold
    X = geoopt.ManifoldParameter(problem.start.clone(), manifold=M)
    optimizer = lrm.optim.CondLR([X], lr / problem.density, momentum=momentum)
    X.grad = torch.zeros_like(problem.start)
    grad = M.unpack(X.grad)
    for _ in range(iterations):
        U, S, V = (f.detach().as_subclass(Tensor).numpy() for f in M.unpack(X))
        left = U @ S  # a new array: every step is at a new point
        ZV, ZtU = problem.products(problem.residuals(left, left, V), U, V)
        grad.U.copy_(torch.from_numpy(ZV @ S.T))
        grad.S.copy_(torch.from_numpy(U.T @ ZV))
        grad.V.copy_(torch.from_numpy(ZtU @ S))
        optimizer.step()
