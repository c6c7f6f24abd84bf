"""What a rule may ask of a manifold, and the answers by the manifold's own methods.

Low-rank weights with the retraction "factored" have coordinates of their own,
:mod:`lrmanifold.optim.velocities`, and accelerators a batch for all of them,
:mod:`lrmanifold.optim.accelerator`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import geoopt
import torch
from torch import Tensor

from .. import linalg, retractions
from ..factors import Factors, pack, perp, unpack
from ..manifolds import FixedRank, WellConditioned


class Whole(NamedTuple):
    """A point or vector that has no blocks."""

    x: Tensor


Blocks = Factors | Whole


def is_factored(manifold: geoopt.Manifold | None) -> bool:
    """Whether weights on `manifold` move by velocities of their factors."""
    return isinstance(manifold, FixedRank) and manifold.retraction_map is retractions.factored


def combine(x: Any, y: Any, a: float) -> Any:
    """x + a y, block by block."""
    return x._make(torch.add(p, q, alpha=a) for p, q in zip(x, y, strict=True))


def along(x: Tensor, d: Tensor, lr: float | Tensor) -> Tensor:
    """x - lr d; a rate in a tensor stays on its device."""
    return torch.sub(x, lr * d) if isinstance(lr, Tensor) else torch.sub(x, d, alpha=lr)


class Ambient:
    """Vectors as the manifold has them, moved by its own methods.

    Parameters
    ----------
    manifold : geoopt.Manifold
    margin : float
        Clip margin of the core; see :class:`lrmanifold.optim.CondLR`.
    """

    def __init__(self, manifold: Any, margin: float = 0.0) -> None:
        self.low_rank = isinstance(manifold, FixedRank)
        # other retractions than "factored" end with the manifold's own projection
        if margin and self.low_rank and not is_factored(manifold):
            manifold = copy.copy(manifold)
            manifold.project_core = partial(manifold.project_core, margin=margin)
        self.manifold, self.margin = manifold, margin

    # -- tensors and blocks

    def split(self, X: Tensor) -> Any:
        """Blocks of a packed tensor, views."""
        return unpack(X, self.manifold.m, self.manifold.n) if self.low_rank else Whole(X)

    def join(self, x: Any) -> Tensor:
        """The packed tensor of blocks."""
        return pack(*x) if self.low_rank else x.x

    def gather(self, tensors: Sequence[Tensor], *, point: bool = False) -> Tensor:
        """One tensor for those of a bundle: itself, or (k, ...)."""
        return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors))

    def scatter(self, X: Tensor, count: int) -> Sequence[Tensor]:
        """The inverse of :meth:`gather`."""
        return [X] if count == 1 else X.unbind()

    gather_moments, scatter_moments = gather, scatter

    def each_moment(self, x: Tensor) -> Tensor:
        """A number a weight, (count,), against its second moments."""
        return x[0] if len(x) == 1 else x[:, None]

    def finite(self, X: Tensor, count: int) -> Tensor:
        """Which of the weights of a gathered tensor hold no NaN and no Inf, (count,)."""
        return torch.linalg.vector_norm(X.reshape(count, -1), math.inf, dim=1) < math.inf

    def mask(self, ok: Tensor, like: Tensor) -> Tensor:
        """A flag a weight, (count,), against a gathered tensor."""
        return ok.view(()) if len(ok) == 1 else ok.view(-1, *(1,) * (like.ndim - 1))

    # -- what rules call

    def velocity(self, X: Any, G: Any, metric: str, b: Any = None, mu: float = 0.0) -> Any:
        """The Riemannian gradient in these coordinates, plus mu b; perhaps not yet projected."""
        xi = self.tangent(X, G)
        if metric == "scalar" and self.low_rank:
            c = X.S.shape[-1] / X.S.square().sum((-2, -1), keepdim=True)
            xi = Factors(xi.U @ (c * X.S.mT @ X.S), xi.S, xi.V @ (c * X.S @ X.S.mT))
        return xi if b is None else combine(xi, b, mu)

    def project(self, X: Any, v: Any) -> Any:
        """Onto the tangent space at `X`; `v`, a result of :meth:`velocity`, may be overwritten."""
        return v

    def add_to_core(self, v: Any, term: Tensor | None) -> Any:
        """Add a matrix to the core of a vector."""
        return v if term is None else v._replace(S=v.S + term)

    def retract(self, X: Any, d: Any, lr: float | Tensor) -> Any:
        """The point that -lr d leads to."""
        return self.split(self.manifold.retr(self.join(X), -lr * self.join(d)))

    def transport(self, X: Any, Y: Any, v: Any) -> Any:
        """A vector at `X` as one at `Y`, in these coordinates."""
        if not is_factored(self.manifold):
            return self.split(self.manifold.transp(self.join(X), self.join(Y), self.join(v)))
        # Velocities keep their coordinates, but for motions of the gauge within the new bases.
        U_dot = perp(Y.U, linalg.solve_right(v.U, X.S))
        V_dot = perp(Y.V, linalg.solve_right(v.V, X.S.mT))
        return Factors(U_dot @ Y.S, v.S, V_dot @ Y.S.mT)

    def tangent(self, X: Any, G: Any) -> Any:
        """The Riemannian gradient as a tangent vector of the manifold."""
        return self.split(self.manifold.egrad2rgrad(self.join(X), self.join(G)))

    def blocks(self, X: Any, v: Any) -> Any:
        """The blocks (U_p, M, V_p) of a vector in these coordinates."""
        return v

    def vector(self, X: Any, xi: Any) -> Any:
        """The inverse of :meth:`blocks`."""
        return xi

    def aspect(self, like: Tensor) -> Tensor:
        """m/n of each low-rank weight, to be multiplied with blocks."""
        counts = self._counts(like)
        return (counts[..., 0] / counts[..., 2])[..., None, None]

    def block_moments(self, X: Any, v: Any) -> Tensor:
        """Mean square of the entries that share a second moment.

        Shape (..., 3) for the blocks of a low-rank weight: each for itself with a bound on the
        condition number, three times that of the whole vector without one (see
        :func:`lrmanifold.optim.adam_update`). On other manifolds from their metric.
        """
        if not self.low_rank:
            inner = self.manifold.inner(X.x, v.x, keepdim=True)
            return inner * (inner.numel() / v.x.numel())
        sums = torch.stack([b.square().sum((-2, -1)) for b in v], -1)
        counts = self._counts(sums)
        if isinstance(self.manifold, WellConditioned):
            return sums / counts
        return (sums.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True)).expand_as(sums)

    def _counts(self, like: Tensor) -> Tensor:
        M = self.manifold
        sizes = (float(M.m * M.rank), float(M.rank**2), float(M.n * M.rank))
        return linalg.constant(sizes, like.dtype, like.device)

    def scaled(self, v: Any, scale: Tensor) -> Any:
        """Each block times its own number, which keeps a tangent vector tangent."""
        if not self.low_rank:
            return Whole(v.x * scale)
        return Factors(*(b * s[..., None, None] for b, s in zip(v, scale.unbind(-1), strict=True)))

    def advance(
        self, X: Any, v: Any, scale: Tensor, force: Tensor | None, lr: float | Tensor
    ) -> tuple[Any, Any]:
        """Move by -lr (scale v + force) and transport the tangent vector v by projection."""
        Y = self.join(self.retract(X, self.add_to_core(self.scaled(v, scale), force), lr))
        moved = self.manifold.transp(self.join(X), Y, self.join(v))
        return self.split(Y), self.split(moved)
