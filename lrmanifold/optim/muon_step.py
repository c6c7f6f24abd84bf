r"""The step of CondLRMuon as a rule: steepest descent for a spectral norm, on one screen.

**The norm.** A tangent vector of W = U S Vᵀ is ξ = U M Vᵀ + U_p Vᵀ + U V_pᵀ with UᵀU_p = 0 and
VᵀV_p = 0. In bases that begin with U and V it is the matrix (M V_pᵀ; U_p 0). Its blocks have the
units of the dense matrix, unlike the velocities U_p S⁻¹, M, V_p S⁻ᵀ of the factors, and do not
depend on the gauge but for rotations. Their largest spectral norm is a norm of the tangent space,

    N(ξ) = max(‖M‖₂, ‖U_p‖₂, ‖V_p‖₂),      N(ξ) <= ‖ξ‖₂ <= φ N(ξ),      φ = (1 + √5)/2 = 1.618.

*Proof.* M = Uᵀ ξ V, U_p = (I - UUᵀ) ξ V and V_p = (I - VVᵀ) ξᵀ U are ξ between matrices of norm
<= 1, hence the left bound, attained where one block alone is not 0. For unit vectors with parts
of sizes (a₁, a₂) and (b₁, b₂), (a₁, a₂)·ξ(b₁, b₂) <= N(ξ) (a₁b₁ + a₁b₂ + a₂b₁), and the form
(1 1; 1 0) has norm φ. With r = 1, M = 1 and unit vectors U_p, V_p this is attained. ∎

**The direction.** Let G be the gradient, with blocks G_M, G_U, G_V in the tangent space. The terms
of ξ are orthogonal, so ⟨G, ξ⟩ = ⟨G_M, M⟩ + ⟨G_U, U_p⟩ + ⟨G_V, V_p⟩, and in the unit ball of N each
block is free: ⟨G, ξ⟩ <= N*(G) = ‖G_M‖_* + ‖G_U‖_* + ‖G_V‖_*, sums of singular values, with equality
for the polar factor of each block (von Neumann). The polar factors are tangent, as those of G_U
and G_V have their columns in the range of G_U and G_V. So they are the steepest direction for N,
exactly. For the spectral norm of ξ itself they are one up to φ: the ball of ‖·‖₂ lies in that of N,
hence no tangent ξ with ‖ξ‖₂ <= 1 has ⟨G, ξ⟩ > N*(G), and ours, divided by its ‖ξ‖₂ <= φ, has at
least N*(G)/φ. (The steepest one for ‖ξ‖₂ has no closed form.)

**Damping.** Singular values that are rounding or noise must not become 1. What is computed maps
each σ to σ/√(σ² + d²) with d = δ‖G‖, ‖G‖ that of all three blocks: a block of rounding stays
small beside the others, and zero stays zero. That is the exact maximum of ⟨G, ξ⟩ + d Σ_B tr (I -
BᵀB)^(1/2) over the ball (for each σ: σx + d√(1 - x²)), and since max_x x - x²/√(1 + x²) = 0.3003
and ‖G‖ <= N*(G) it has

    ⟨G, ξ⟩ >= (1 - 0.3003 k δ) N*(G),      k <= 3r the number of nonzero singular values.

δ = 1e-3 is the share of ‖G‖ below which Muon's five steps leave singular values small, too.

**The size.** ξ has N(ξ) <= 1 for every scale of the gradient. The step is lr √(m/n) ξ: its norm as
a map from vectors of mean square 1 to vectors of mean square 1, √(n/m)‖·‖₂, is at most φ lr for all
m, n and r. So lr is the relative change of a layer's output, and keeps its meaning over width
(G. Yang, J. Simons, J. Bernstein, *A spectral condition for feature learning*, 2023). A step of
entries of a given size, 0.2 √max(m, n) ξ, would grow with √width in that norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..factors import Factors
from .adam_step import adam
from .coordinates import Ambient, Blocks, combine
from .step import State, core_force

# δ, the share of ‖G‖ below which singular values count less and less.
DAMPING = 1e-3


def muon(M: Ambient, X: Any, G: Blocks, state: State, o: Mapping[str, Any]) -> tuple:
    """b ← ξ + μ b; the point moves along -lr (√(m/n) steepest(b) + wd S + β∇R(S)).

    Momentum is kept and transported as in CondLR: velocities, projected with the next gradient.
    With Nesterov's momentum the direction is that of ξ + μ b. Decay and penalty act on the core,
    outside of momentum and direction, as in AdamW. Manifolds without blocks take Adam's step.
    """
    if not M.low_rank:
        return adam(M, X, G, state, o)
    mu = o["momentum"]
    d = b = M.project(X, M.velocity(X, G, "exact", state["momentum_buffer"], mu))
    if o["nesterov"] and mu:
        d = combine(M.project(X, M.velocity(X, G, "exact")), b, mu)
    xi = steepest(M.blocks(X, d))
    size = M.aspect(X.S).sqrt()
    d = M.vector(X, Factors(*(block * size for block in xi)))
    Y = M.retract(X, M.add_to_core(d, core_force(X, o)), o["lr"])
    return Y, {"momentum_buffer": M.transport(X, Y, b)}


def steepest(xi: Factors, damping: float = DAMPING) -> Factors:
    """The damped polar factors of the blocks (U_p, M, V_p), a vector with N <= 1.

    Up to rounding, which in float32 leaves N <= 1 + 1e-5.

    Parameters
    ----------
    xi : Factors
        Blocks of a tangent vector, (..., m, r), (..., r, r), (..., n, r), of any size.
    damping : float
        δ; see above.
    """
    # First by the largest entry: squares of gradients of size 1e-25 underflow.
    largest = torch.stack([_norm(block, float("inf")) for block in xi]).amax(0)
    tiny = torch.finfo(largest.dtype).tiny
    xi = Factors(*(block / largest.clamp_min(tiny) for block in xi))
    # At least 1, but for a gradient of zeros, which stays zero.
    whole = _norm(torch.stack([_norm(block, 2) for block in xi], -1)[..., 0, :], 2)
    whole = whole.clamp_min(1.0)
    return Factors(*(linalg.damped_polar(block / whole, damping) for block in xi))


def _norm(A: Tensor, order: float) -> Tensor:
    return torch.linalg.vector_norm(A, order, dim=(-2, -1), keepdim=True)
