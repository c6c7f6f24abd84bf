"""In which coordinates a rule moves points: as the manifold has them, or by velocities of factors.

:class:`Ambient` works on every geoopt manifold by the manifold's own methods. :class:`Velocities`
is for low-rank weights with the retraction "factored": a tangent vector (U_p, M, V_p) of
U S Vᵀ is kept as the velocity (U̇, Ṡ, V̇) = (U_p S⁻¹, M, V_p S⁻ᵀ) of the factors. Then neither
gradient, momentum nor point is multiplied by S, and transport is the projection that the next
gradient needs anyway (mathematics 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import geoopt
import torch
from torch import Tensor

from .. import linalg, retractions
from ..factors import Factors, pack, perp, unpack
from ..manifolds import FixedRank, WellConditioned
from ..precision import compute_dtype


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


def plus_product(
    b: Tensor,
    P: Tensor,
    Q: Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """beta b + alpha P Q in one call, into `out`, which may be `b`."""
    if b.ndim <= 3:
        product = torch.addmm if b.ndim == 2 else torch.baddbmm
        return product(b, P, Q, beta=beta, alpha=alpha, out=out)
    return torch.add(beta * b, P @ Q, alpha=alpha, out=out)


def room_for(X: Factors) -> Factors:
    """Blocks like those of `X`, to be written to, of one new packed tensor."""
    m, r, n = (b.shape[-2] for b in X)
    return unpack(X.U.new_empty(*X.U.shape[:-2], m + r + n, r), m, n)


def packed_of(x: Factors) -> Tensor | None:
    """The tensor that :func:`room_for` has made for these blocks; None for others."""
    whole, starts = x.U._base, [b.storage_offset() for b in x]
    rows = sum(b.shape[-2] for b in x)
    if whole is None or any(b._base is not whole for b in x) or starts != sorted(starts):
        return None
    return whole if whole.shape == (*x.U.shape[:-2], rows, x.U.shape[-1]) else None


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
        self.manifold, self.margin = manifold, margin
        self.low_rank = isinstance(manifold, FixedRank)

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

    def gather_moments(self, tensors: Sequence[Tensor]) -> Tensor:
        """Second moments of a bundle."""
        return Ambient.gather(self, tensors)

    def scatter_moments(self, X: Tensor, count: int) -> Sequence[Tensor]:
        """The inverse of :meth:`gather_moments`."""
        return Ambient.scatter(self, X, count)

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


class Velocities(Ambient):
    """Velocities of the factors, (..., m, r), (..., r, r), (..., n, r), by thin products."""

    def join(self, x: Factors) -> Tensor:
        packed = packed_of(x)
        return pack(*x) if packed is None else packed

    def velocity(
        self, X: Factors, G: Factors, metric: str, b: Any = None, mu: float = 0.0
    ) -> Factors:
        """(g_U (SSᵀ)⁻¹, g_S, g_V (SᵀS)⁻¹) + mu b; the scalar metric has r/‖S‖² for inverses."""
        if metric == "scalar":
            A_u = A_v = X.S.shape[-1] / X.S.square().sum((-2, -1), keepdim=True)
            if self.manifold.gradient == "probe":
                A_u, A_v = A_u * X.S.mT, A_u * X.S
        elif self.manifold.gradient == "probe":
            A_u = self.inverse(X.S)
            A_v = A_u.mT
        else:
            A_u, A_v = self.inverse_grams(X.S)
        product = torch.mul if A_u.shape != X.S.shape else torch.matmul
        if b is None:
            return Factors(product(G.U, A_u), G.S, product(G.V, A_v))
        v = room_for(X)
        torch.add(G.S, b.S, alpha=mu, out=v.S)
        for g, A, before, new in ((G.U, A_u, b.U, v.U), (G.V, A_v, b.V, v.V)):
            if product is torch.mul:
                torch.add(g * A, before, alpha=mu, out=new)
            else:
                plus_product(before, g, A, beta=mu, out=new)
        return v

    def project(self, X: Factors, v: Factors) -> Factors:
        """Take the motions within the bases out of U̇ and V̇, in place."""
        return Factors(self.perp(X.U, v.U, 0, v.U), v.S, self.perp(X.V, v.V, 1, v.V))

    def retract(self, X: Factors, d: Factors, lr: float | Tensor) -> Factors:
        """Polar factors of U - lr U̇ and V - lr V̇, and S - lr Ṡ projected onto the set."""
        U, V = self.polars(along(X.U, d.U, lr), along(X.V, d.V, lr))
        return Factors(U, self.project_core(along(X.S, d.S, lr)), V)

    def transport(self, X: Factors, Y: Factors, v: Factors) -> Factors:
        """Velocities keep their coordinates; the next :meth:`project` does the rest."""
        return v

    def tangent(self, X: Factors, G: Factors) -> Factors:
        """(U_p, M, V_p) as in ``manifold.egrad2rgrad``."""
        if self.manifold.gradient == "probe":
            return Factors(self.perp(X.U, G.U, 0), G.S, self.perp(X.V, G.V, 1))
        inverse = self.inverse(X.S)
        return self.project(X, Factors(G.U @ inverse.mT, G.S, G.V @ inverse))

    def advance(
        self, X: Factors, v: Factors, scale: Tensor, force: Tensor | None, lr: float | Tensor
    ) -> tuple[Factors, Factors]:
        """As :meth:`Ambient.advance`, without forming the step.

        U - v_U N spans the new basis Q, hence (I - QQᵀ)(U A + v_U B) = (I - QQᵀ) v_U (N A + B).
        """
        s_u, s_s, s_v = (s[..., None, None] for s in scale.unbind(-1))
        inverse = self.inverse(X.S)
        N_u, N_v = lr * s_u * inverse, lr * s_v * inverse.mT
        Y_u = plus_product(X.U, v.U, N_u, alpha=-1.0)
        Y_v = plus_product(X.V, v.V, N_v, alpha=-1.0)
        Q, P, H_u, H_v = self.decompositions(Y_u, Y_v)
        core = s_s * v.S if force is None else s_s * v.S + force
        c, d = Q.mT @ v.U, P.mT @ v.V
        a, b = plus_product(H_u, c, N_u), plus_product(H_v, d, N_v)  # QᵀU, PᵀV
        right = plus_product(d.mT, v.S, b.mT)
        left = plus_product(c, a, v.S).mT
        moved = Factors(
            self.outside(Q, v.U, plus_product(b.mT, N_u, right), c, 0),
            plus_product(a @ right, c, b.mT),
            self.outside(P, v.V, plus_product(a.mT, N_v, left), d, 1),
        )
        return Factors(Q, self.project_core(along(X.S, core, lr)), P), moved

    # -- kernels, which accelerators replace

    def project_core(self, S: Tensor) -> Tensor:
        """The manifold's own projection of a core."""
        if self.margin:
            return self.manifold.project_core(S, margin=self.margin)
        return self.manifold.project_core(S)

    def polars(self, Y_u: Tensor, Y_v: Tensor) -> tuple[Tensor, Tensor]:
        """Polar factors of both moved bases; a square one has not moved."""
        U, V = (Y if Y.shape[-2] == Y.shape[-1] else linalg.polar(Y) for Y in (Y_u, Y_v))
        return U, V

    def decompositions(self, Y_u: Tensor, Y_v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The polar factors Q of both moved bases, then the two QᵀY."""
        (Q, H_u), (P, H_v) = (
            (Y, Y.mT @ Y) if Y.shape[-2] == Y.shape[-1] else linalg.polar_decomposition(Y)
            for Y in (Y_u, Y_v)
        )
        return Q, P, H_u, H_v

    def perp(self, Q: Tensor, Z: Tensor, side: int, out: Tensor | None = None) -> Tensor:
        """(I - QQᵀ) Z; 0 where the basis is square. `out` may be `Z`."""
        if Q.shape[-2] == Q.shape[-1]:
            return torch.zeros_like(Z) if out is None else out.zero_()
        return plus_product(Z, Q, Q.mT @ Z, alpha=-1.0, out=out)

    def outside(self, Q: Tensor, Z: Tensor, B: Tensor, overlap: Tensor, side: int) -> Tensor:
        """(I - QQᵀ) Z B, where `overlap` is QᵀZ."""
        found = Z @ B
        return plus_product(found, Q, overlap @ B, alpha=-1.0, out=found)

    def inverse(self, S: Tensor) -> Tensor:
        """S⁻¹."""
        return linalg.inverse(S)

    def inverse_grams(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """(SSᵀ)⁻¹ and (SᵀS)⁻¹."""
        inverse = self.inverse(S)
        return linalg.gram(inverse), linalg.gram(inverse.mT)


def tangent_of_velocity(manifold: FixedRank, X: Tensor, velocity: Tensor) -> Tensor:
    """The packed tangent vector (U_p, M, V_p) at the packed point `X` of a velocity (U̇, Ṡ, V̇)."""
    wide = compute_dtype(X.dtype)
    (U, S, V), v = manifold.unpack(X.to(wide)), manifold.unpack(velocity.to(wide))
    return pack(perp(U, v.U) @ S, v.S, perp(V, v.V) @ S.mT).to(X.dtype)


def velocity_of_tangent(X: Factors, xi: Factors) -> Factors:
    """The inverse of :func:`tangent_of_velocity`, for cores that may be singular."""
    inverse = torch.linalg.pinv(X.S)
    return Factors(xi.U @ inverse, xi.S, xi.V @ inverse.mT)
