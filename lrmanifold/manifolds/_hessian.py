"""The Riemannian Hessian of the fixed-rank manifold, from gradients with respect to the factors."""

from __future__ import annotations

from .. import linalg
from ..factors import Factors, perp


def lift(X: Factors, xi: Factors) -> Factors:
    """Velocity (U_p S⁻¹, M, V_p S⁻ᵀ) of the factors that moves U S Vᵀ along ξ."""
    return Factors(linalg.solve_right(xi.U, X.S), xi.S, linalg.solve_right(xi.V, X.S.mT))


def ehess2rhess(X: Factors, g: Factors, h: Factors, xi: Factors) -> Factors:
    """Riemannian Hessian along ξ; see :meth:`FixedRank.ehess2rhess`.

    With Ẇ = ξ, differentiating g_U = G V Sᵀ, g_S = UᵀGV, g_V = GᵀU S along the lifted direction and
    solving for the products that the Hessian needs:

        Ġ V + G V_p S⁻ᵀ  = (ġ_U - GV Mᵀ) S⁻ᵀ,   GV  = g_U S⁻ᵀ,
        ĠᵀU + GᵀU_p S⁻¹ = (ġ_V - GᵀU M) S⁻¹,   GᵀU = g_V S⁻¹,
        UᵀĠV            = ġ_S - S⁻ᵀ U_pᵀ GV - UᵀG V_p S⁻ᵀ.

    The second terms on the left are the curvature: P_W(Ġ) alone would be the Euclidean Hessian,
    projected.
    """
    S = X.S
    GV, GtU = linalg.solve_right(g.U, S.mT), linalg.solve_right(g.V, S)
    H_u = linalg.solve_right(h.U - GV @ xi.S.mT, S.mT)
    H_v = linalg.solve_right(h.V - GtU @ xi.S, S)
    left = linalg.solve_right(GV.mT @ xi.U, S).mT
    right = linalg.solve_right(GtU.mT @ xi.V, S.mT)
    return Factors(perp(X.U, H_u), h.S - left - right, perp(X.V, H_v))
