r"""From factor gradients to the Riemannian gradient, without the dense gradient.

**Statement.** For a loss L(W), W = U S Vᵀ with *any* invertible core S, let g_U, g_S, g_V be what
automatic differentiation returns for the factors, and G = ∇L(W). Then g_U = G V Sᵀ, g_S = UᵀGV,
g_V = GᵀU S, so P_W G = U M Vᵀ + U_p Vᵀ + U V_pᵀ with

    M = g_S,   U_p = (I - UUᵀ) g_U S⁻ᵀ,   V_p = (I - VVᵀ) g_V S⁻¹.

**Gauge identities.** L(U S Vᵀ) does not change under U → UA, S → A⁻¹S, nor under V → VA, S → S A⁻ᵀ;
differentiated at A = I this says

    Uᵀg_U = g_S Sᵀ,   Vᵀg_V = g_Sᵀ S:

a free test of any implementation of a low-rank layer.

**Hypothesis.** S invertible. The transposes matter only because S is not symmetric: with a diagonal
core the wrong formulas pass. mathematics 1 (classical).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrmanifold import Factors, FixedRank

from ..core import Claim, Control, Evidence, Sample, Source, identity, worst_of
from ..sampling import Draw, dense, eps

ROUNDING = 64.0


def left_block(U: Tensor, g_U: Tensor, S: Tensor) -> Tensor:
    """U_p = (I - UUᵀ) g_U S⁻ᵀ; with (V, g_V, Sᵀ) it is V_p."""
    B = torch.linalg.solve(S, g_U.mT).mT
    return B - U @ (U.mT @ B)


def gauge(g_S: Tensor, S: Tensor) -> Tensor:
    """Uᵀg_U = g_S Sᵀ; with (g_Sᵀ, Sᵀ) it is Vᵀg_V."""
    return g_S @ S.mT


def loss(W: Tensor, A: Tensor) -> Tensor:
    """Smooth, not quadratic, no symmetry."""
    return (torch.sin(W + A) + 0.3 * A * W).sum()


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(full_rank=True)
    X = draw.point(m, n, r, draw.cond())
    return {"X": draw.give_point(X), "A": draw.give(draw.normal(m, n))}


def check(
    sample: Sample,
    *,
    left_block: Callable[[Tensor, Tensor, Tensor], Tensor] = left_block,
    gauge: Callable[[Tensor, Tensor], Tensor] = gauge,
) -> Evidence:
    X, A = sample["X"], sample["A"]
    (m, n), r = A.shape, X.S.shape[-1]
    leaves = Factors(*(b.clone().requires_grad_() for b in X))
    g_U, g_S, g_V = torch.autograd.grad(loss(dense(leaves), A), leaves)
    W = dense(X).requires_grad_()
    (G,) = torch.autograd.grad(loss(W, A), W)

    manifold = FixedRank(m, n, r)
    packed = manifold.pack(*X)
    exact = manifold.project_ambient(packed, G)
    claimed = manifold.pack(left_block(X.U, g_U, X.S), g_S, left_block(X.V, g_V, X.S.mT))
    library = manifold.egrad2rgrad(packed, manifold.pack(g_U, g_S, g_V))
    s = torch.linalg.svdvals(X.S)
    deviations = {
        "blocks": (claimed - exact).norm() / G.norm(),
        "library's": (library - exact).norm() / G.norm(),
        "gauge, U": (X.U.mT @ g_U - gauge(g_S, X.S)).norm() / (G.norm() * s[0]),
        "gauge, V": (X.V.mT @ g_V - gauge(g_S.mT, X.S.mT)).norm() / (G.norm() * s[0]),
    }
    worst, size = worst_of(deviations)
    # G itself moves with the rounding of W: its Lipschitz constant is 1, ‖W‖ <= sqrt(r) σ_1.
    condition = float(s[0] / s[-1]) + float(W.detach().norm() / G.norm())
    return identity(size, tolerance=ROUNDING * eps(A) * condition, detail={"worst": worst})


def wide_core(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """r = 3: for r = 1 there is no difference between S and Sᵀ."""
    return sample(seed, dtype, device, m=6, n=5, r=3)


def wrong_side(U: Tensor, g_U: Tensor, S: Tensor) -> Tensor:
    """S⁻¹ in place of S⁻ᵀ."""
    return left_block(U, g_U, S.mT)


def not_projected(U: Tensor, g_U: Tensor, S: Tensor) -> Tensor:
    return torch.linalg.solve(S, g_U.mT).mT


CLAIM = Claim(
    id="geometry/gradient-map",
    title="Riemannian gradient from factor gradients; gauge identities",
    statement=(
        r"M=g_S,\ U_p=(I-UU^\top)g_US^{-\top},\ V_p=(I-VV^\top)g_VS^{-1};\quad "
        r"U^\top g_U=g_SS^\top,\ V^\top g_V=g_S^\top S"
    ),
    hypotheses=("S invertible, not necessarily symmetric", "L differentiable at W"),
    source=Source("classical", "Koch and Lubich 2007, prop. 2.1; mathematics 1"),
    sample=sample,
    check=check,
    controls=(
        Control("S⁻¹ in place of S⁻ᵀ", partial(check, left_block=wrong_side), wide_core),
        Control("not projected", partial(check, left_block=not_projected)),
        Control(
            "gauge identity with S in place of Sᵀ", partial(check, gauge=torch.matmul), wide_core
        ),
    ),
    trials=60,
    float32="64 eps (cond S + ‖W‖/‖G‖): the solve with S, and ∇L at a rounded W",
    kind="identity",
)
