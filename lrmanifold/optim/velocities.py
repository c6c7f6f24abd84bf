"""Low-rank weights by velocities of their factors: how a step moves U, S and V.

With the retraction "factored" a tangent vector (U_p, M, V_p) of U S Vᵀ is kept as the velocity
(U̇, Ṡ, V̇) = (U_p S⁻¹, M, V_p S⁻ᵀ) of the factors. Then neither gradient, momentum nor point is
multiplied by S, and transport is the projection that the next gradient needs anyway
(mathematics 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..factors import Factors, pack, perp
from ..manifolds import FixedRank
from ..precision import compute_dtype, without_autocast
from .coordinates import Ambient, along, combine


def plus_product(b: Tensor, P: Tensor, Q: Tensor, **options: Any) -> Tensor:
    """beta b + alpha P Q in one call, with the options beta, alpha and out of ``torch.addmm``."""
    if b.ndim <= 3:
        return (torch.addmm if b.ndim == 2 else torch.baddbmm)(b, P, Q, **options)
    return torch.add(options.pop("beta", 1.0) * b, P @ Q, **options)


class Velocities(Ambient):
    """Velocities of the factors, (..., m, r), (..., r, r), (..., n, r), by thin products."""

    _inverted: tuple[Tensor, Tensor] | None = None

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
        number = A_u.shape != X.S.shape
        if b is None or number:
            product = torch.mul if number else torch.matmul
            v = Factors(product(G.U, A_u), G.S, product(G.V, A_v))
            return v if b is None else combine(v, b, mu)
        U, V = plus_product(b.U, G.U, A_u, beta=mu), plus_product(b.V, G.V, A_v, beta=mu)
        return Factors(U, torch.add(G.S, b.S, alpha=mu), V)

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

    def blocks(self, X: Factors, v: Factors) -> Factors:
        """(U̇ S, Ṡ, V̇ Sᵀ)."""
        return Factors(v.U @ X.S, v.S, v.V @ X.S.mT)

    def vector(self, X: Factors, xi: Factors) -> Factors:
        """(U_p S⁻¹, M, V_p S⁻ᵀ)."""
        inverse = self.inverse(X.S)
        return Factors(xi.U @ inverse, xi.S, xi.V @ inverse.mT)

    def advance(
        self, X: Factors, v: Factors, scale: Tensor, force: Tensor | None, lr: float | Tensor
    ) -> tuple[Factors, Factors]:
        """As :meth:`Ambient.advance`, without forming the step.

        Q = Y_u K is the polar factor of Y_u = U - v_U N. As Uᵀv_U = 0, QᵀU = K YᵀU = K, and
        (I - QQᵀ)(U A + v_U B) = (I - QQᵀ) v_U (N A + B).
        """
        s_u, s_s, s_v = (s[..., None, None] for s in scale.unbind(-1))
        inverse = self.inverse(X.S)
        N_u, N_v = lr * s_u * inverse, lr * s_v * inverse.mT
        Y_u = plus_product(X.U, v.U, N_u, alpha=-1.0)
        Y_v = plus_product(X.V, v.V, N_v, alpha=-1.0)
        Q, P, a, b = self.decompositions(X, Y_u, Y_v)
        core = s_s * v.S if force is None else s_s * v.S + force
        c, d = Q.mT @ v.U, P.mT @ v.V
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

    def decompositions(self, X: Factors, Y_u: Tensor, Y_v: Tensor) -> tuple[Tensor, ...]:
        """The polar factors Q and P of both moved bases, then QᵀU and PᵀV."""
        (Q, K_u), (P, K_v) = (
            (Y, Y.mT @ Y) if Y.shape[-2] == Y.shape[-1] else linalg.polar_with_root(Y)
            for Y in (Y_u, Y_v)
        )
        return Q, P, K_u, K_v

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
        """S⁻¹; gradient and motion of one step share it."""
        if self._inverted is None or self._inverted[0] is not S:
            self._inverted = S, self._inverse(S)
        return self._inverted[1]

    def _inverse(self, S: Tensor) -> Tensor:
        return linalg.inverse(S)

    def inverse_grams(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """(SSᵀ)⁻¹ and (SᵀS)⁻¹."""
        inverse = self.inverse(S)
        return linalg.gram(inverse), linalg.gram(inverse.mT)


@without_autocast
def tangent_of_velocity(manifold: FixedRank, X: Tensor, velocity: Tensor) -> Tensor:
    """The packed tangent vector (U_p, M, V_p) at the packed point `X` of a velocity (U̇, Ṡ, V̇)."""
    wide = compute_dtype(X.dtype)
    (U, S, V), v = manifold.unpack(X.to(wide)), manifold.unpack(velocity.to(wide))
    return pack(perp(U, v.U) @ S, v.S, perp(V, v.V) @ S.mT).to(X.dtype)


def velocity_of_tangent(X: Factors, xi: Factors) -> Factors:
    """The inverse of :func:`tangent_of_velocity`, for cores that may be singular."""
    inverse = torch.linalg.pinv(X.S)
    return Factors(xi.U @ inverse, xi.S, xi.V @ inverse.mT)
