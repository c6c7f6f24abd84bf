r"""L3.6, second part: the principal curvatures of M_r.

**Statement.** For a normal vector N at X = U S Vᵀ the shape operator S_N ξ := P_X (DP_X[ξ] N) is

    S_N ξ = U S⁻ᵀ U_pᵀ N + N V_p S⁻ᵀ Vᵀ,

self-adjoint on T_X M_r, with eigenvalues ±σ_i(N)/σ_j(X) for all i, j, and 0. So the largest
principal curvature in a direction N of unit ‖N‖₂ is 1/σ_r(X), both ways: M_r is a saddle
everywhere.

**Proof.** S_N maps the U_p-part to the V_p-part and back. With singular vectors N = Σ σ_i a_i b_iᵀ
and X = Σ σ_j u_j v_jᵀ, the plane of (a_i v_jᵀ, u_j b_iᵀ) is invariant, and S_N acts there as
(σ_i(N)/σ_j(X)) [[0, 1], [1, 0]]. ∎

**Checked** by differentiating the projector itself: central differences of t ↦ P_{R(tη)} N over an
orthonormal basis of T_X give a matrix; it is compared with the formula, and its eigenvalues with
the list. Absil, Mahony, Trumpf 2013; Feppon and Lermusiaux 2019. mathematics 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lrmanifold import FixedRank, retractions

from ..core import Claim, Control, Evidence, Sample, Source, identity, largest
from ..sampling import Draw, eps

ROUNDING = 8.0


def eigenvalues(of_N: Tensor, of_X: Tensor, dim: int) -> Tensor:
    """±σ_i(N)/σ_j(X) and zeros up to the dimension, increasing."""
    pairs = (of_N[:, None] / of_X[None, :]).flatten()
    zeros = pairs.new_zeros(dim - 2 * len(pairs))
    return torch.cat((pairs, -pairs, zeros)).sort().values


def tangent_basis(manifold: FixedRank, X: Tensor) -> Tensor:
    """Packed orthonormal basis of the tangent space, shape (dim, m + r + n, r)."""
    P = manifold.proju(
        X, torch.eye(X.numel(), dtype=X.dtype, device=X.device).reshape(-1, *X.shape)
    )
    _, V = torch.linalg.eigh(P.reshape(X.numel(), X.numel()))
    # Once more: eigenvectors are tangent to roundoff, the projection makes them so.
    return manifold.proju(X, V.mT[-manifold.dim :].reshape(-1, *X.shape))


def shape_operator(manifold: FixedRank, X: Tensor, N: Tensor, basis: Tensor) -> Tensor:
    """The matrix of ξ ↦ U S⁻ᵀU_pᵀN + N V_p S⁻ᵀVᵀ in a basis of packed tangent vectors."""
    _, S, _ = manifold.unpack(X)
    U_p, _, V_p = manifold.unpack(basis)
    # Its blocks: U_p-part N V_p S⁻ᵀ, no M, V_p-part NᵀU_p S⁻¹.
    left = torch.linalg.solve(S, (N @ V_p).mT).mT
    right = torch.linalg.solve(S.mT, (N.mT @ U_p).mT).mT
    image = manifold.pack(left, torch.zeros_like(left[:, : manifold.rank]), right)
    return image.flatten(1) @ basis.flatten(1).mT


def differentiated(manifold: FixedRank, X: Tensor, N: Tensor, basis: Tensor) -> Tensor:
    """The matrix of ξ ↦ P_X (DP_X[ξ] N) by central differences."""
    h = eps(X) ** (1 / 3)
    points = X.expand_as(basis)
    moved = []
    for t in (h, -h):
        Y = retractions.orthographic(manifold, points, t * basis)
        moved.append(
            manifold.tangent_to_dense(Y, manifold.project_ambient(Y, N.expand(len(Y), -1, -1)))
        )
    derivative = (moved[0] - moved[1]) / (2 * h)
    return manifold.project_ambient(points, derivative).flatten(1) @ basis.flatten(1).mT


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(2, 6)
    manifold = FixedRank(m, n, r)
    s = draw.spectrum(r, draw.cond(1.0, 10.0), draw.uniform(0.7, 2.0))
    X = manifold.pack(draw.frame(m, r), draw.core(s), draw.frame(n, r))
    U, _, V = manifold.unpack(X)
    Z = draw.normal(m, n)
    N = Z - U @ (U.mT @ Z)
    N = N - (N @ V) @ V.mT
    return {"manifold": manifold, "X": draw.give(X), "N": draw.give(N / N.norm())}


def check(
    sample: Sample, *, eigenvalues: Callable[[Tensor, Tensor, int], Tensor] = eigenvalues
) -> Evidence:
    manifold, X, N = sample["manifold"], sample["X"], sample["N"]
    m, n, r = manifold.m, manifold.n, manifold.rank
    basis = tangent_basis(manifold, X)
    found = differentiated(manifold, X, N, basis)
    formula = shape_operator(manifold, X, N, basis)
    of_X = manifold.svdvals(X)
    of_N = torch.linalg.svdvals(N)[: min(m, n) - r]
    claimed = eigenvalues(of_N, of_X, manifold.dim)
    measured = torch.linalg.eigvalsh(0.5 * (found + found.mT))
    deviations = (found - found.mT, found - formula, measured - claimed)
    # Truncation h² ‖D³P‖ with derivatives like 1/σ³, rounding eps cond/h.
    scale = 1.0 + float(of_X[-1]) ** -3 + float(of_X[0] / of_X[-1])
    return identity(
        largest(d.abs().max() for d in deviations),
        tolerance=ROUNDING * eps(X) ** (2 / 3) * scale,
        detail={"measured": measured.tolist(), "claimed": claimed.tolist()},
    )


def inverse_square(of_N: Tensor, of_X: Tensor, dim: int) -> Tensor:
    return eigenvalues(of_N, of_X**2, dim)


def positive_only(of_N: Tensor, of_X: Tensor, dim: int) -> Tensor:
    return eigenvalues(of_N, of_X, dim).abs().sort().values


def figure(dtype: torch.dtype, device: torch.device):
    """Curvatures against the list, and the radius of curvature as σ_r falls."""
    from ..plotting import COLOURS, MARKERS, new

    fig, (left, right) = new(2, width=5.4, height=4.4)
    given = sample(4, torch.float64, device, m=6, n=5, r=2, cond=4.0)
    detail = check(given).detail
    index = range(1, len(detail["claimed"]) + 1)
    left.plot(
        index, detail["claimed"], "o", ms=9, mfc="none", color=COLOURS[2], label="±σ_i(N)/σ_j(X), 0"
    )
    left.plot(
        index, detail["measured"], ".", color=COLOURS[1], label="eigenvalues of P_X DP_X[·] N"
    )
    left.set(xlabel="index of the eigenvalue", ylabel="principal curvature, ‖N‖_F = 1")
    left.set_xticks(range(0, 19, 3))
    left.set(title="6 x 5, rank 2: all 18 principal curvatures")
    left.legend(loc="upper left")
    a = torch.linspace(-1.2, 1.2, 121, dtype=torch.float64)
    for sigma, colour in zip(
        (0.25, 0.5, 1.0, 2.0), (COLOURS[2], COLOURS[5], COLOURS[3], COLOURS[1]), strict=True
    ):
        # [[w, a], [a, c]] has rank 1 with w = σ + (higher order) when c = a²/w.
        right.plot(a, a**2 / sigma, color=colour, label=f"σ_r = {sigma:g}")
    right.set(
        ylim=(0, 1.5),
        xlabel="step along ξ = (e₁e₂ᵀ + e₂e₁ᵀ)/√2, as ξ₁₂",
        ylabel="distance along the normal e₂e₂ᵀ",
    )
    right.set(title="Rank 1 above its tangent plane: c = a²/σ")
    right.legend(loc="upper center", title="curvature 1/σ_r")
    del MARKERS
    return fig


CLAIM = Claim(
    id="geometry/principal-curvatures",
    title="Principal curvatures of M_r are ±σ_i(N)/σ_j(X)",
    statement=(
        r"S_N\xi=P_X\,\mathrm DP_X[\xi]N=US^{-\top}U_p^\top N+NV_pS^{-\top}V^\top,\quad"
        r"\mathrm{spec}\,S_N=\{\pm\sigma_i(N)/\sigma_j(X)\}\cup\{0\}"
    ),
    hypotheses=("N normal at X", "r < min(m, n)"),
    source=Source(
        "classical", "Absil, Mahony, Trumpf 2013; Feppon and Lermusiaux 2019; mathematics L3.6"
    ),
    sample=sample,
    check=check,
    controls=(
        Control("σ_j(X)² in place of σ_j(X)", partial(check, eigenvalues=inverse_square)),
        Control("no negative curvatures", partial(check, eigenvalues=positive_only)),
    ),
    trials=60,
    figure=figure,
    float32="8 eps^(2/3) (1 + σ_r⁻³ + cond): central differences with h = eps^(1/3)",
    kind="identity",
)
