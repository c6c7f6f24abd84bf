r"""L3.4: M_r curves away from its tangent space no faster than a ball of radius σ_r.

**Statement.** For Y of rank r, any normal vector N ∈ N_Y M_r, and *any* X of rank at most r,

    ⟨X - Y, N⟩ <= ‖N‖₂ ‖X - Y‖_F² / (2 σ_r(Y)).

So M_r is prox-regular with reach σ_r(Y) in the direction of unit ‖N‖₂, without any nearness.

**Proof.** Let t = σ_r(Y)/‖N‖₂. The singular values of Y + tN are those of Y and of tN, the latter
at most σ_r(Y): Y is a best rank-r approximation of Y + tN (Eckart-Young). Hence
‖Y + tN - X‖² >= ‖tN‖²; expand the square. ∎

**Sharp.** r = 1, Y = σ e₁e₁ᵀ, X = σ u uᵀ with u at angle θ to e₁, N = e₂e₂ᵀ: the left side is
σ sin²θ, and ‖X - Y‖² = 2σ² sin²θ. Equality at every angle: these X lie on a circle (picture).

It is the lemma on which theorem A rests; the constant ½ there is this one. That M_r is prox-regular
is known: Luke (JMIV 2013, arXiv 1112.0526). The sharp constant, for any distance: ours (mathematics
3).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, dense, eps
from ._pairs import circle, draw_pair, lowered, smallest, tangent

CONSTANT = 0.5
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """A pair and a normal vector: the worst for the pair, its leading part, or a random one."""
    draw = Draw(seed, dtype, device, **fixed)
    X, Y = draw_pair(draw, both_sides=True)
    D = dense(lowered(draw, X)) - dense(Y)
    Z = draw.normal(*D.shape)
    random, worst = Z - tangent(Y, Z), D - tangent(Y, D)
    # A pair with a common row or column space has no normal part, and every N is as good.
    N = worst if worst.norm() > 1e-6 * D.norm() and draw.uniform() < 0.8 else random
    if draw.uniform() < 0.5:
        U, _, Vh = torch.linalg.svd(N)
        N = U[:, :1] @ Vh[:1]
    N = N if (N * D).sum() >= 0 else -N
    return {"Y": draw.give_point(Y), "D": draw.give(D), "N": draw.give(N / N.norm())}


def check(sample: Sample, *, constant: float = CONSTANT) -> Evidence:
    Y, D, N = sample["Y"], sample["D"], sample["N"]
    size = torch.linalg.matrix_norm(N, 2)
    measured = (D * N).sum()
    bound = constant * size * D.square().sum() / smallest(Y)
    return inequality(measured, bound, tolerance=ROUNDING * eps(D) * float(D.norm() + bound))


def attained(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    draw = Draw(seed, dtype, device)
    pair = circle(draw.uniform(0.1, 1.5), draw.log_uniform(0.1, 10.0), dtype, device)
    N = torch.zeros(3, 3, dtype=dtype, device=device)
    N[1, 1] = 1.0
    return {**pair, "N": N}


def not_normal(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """N with a tangent part, and X a small step along it."""
    given = sample(seed, dtype, device, cond=2.0)
    Y, N = given["Y"], given["N"]
    N = N + tangent(Y, torch.ones_like(N) / N.numel() ** 0.5)
    step = 1e-2 * smallest(Y) * tangent(Y, N)
    return {"Y": Y, "D": step, "N": N}


def figure(dtype: torch.dtype, device: torch.device):
    """The cone of symmetric 2 x 2 matrices of rank 1, and the ball that touches it at Y."""
    import math

    from ..plotting import COLOURS, new

    fig, (left, right) = new(2, width=5.6, height=4.8)
    fig.delaxes(left)
    left = fig.add_subplot(1, 2, 1, projection="3d")
    # a e₁e₁ᵀ + b (e₁e₂ᵀ + e₂e₁ᵀ)/√2 + c e₂e₂ᵀ are orthonormal coordinates; s u uᵀ is the cone.
    s, phi = torch.meshgrid(
        torch.linspace(0, 1.6, 30), torch.linspace(0, math.pi, 90), indexing="ij"
    )
    cone = (s * phi.cos() ** 2, math.sqrt(2) * s * phi.cos() * phi.sin(), s * phi.sin() ** 2)
    left.plot_surface(*cone, color=COLOURS[6], alpha=0.35, linewidth=0)
    t = torch.linspace(0, math.pi, 200)
    ring = (t.cos() ** 2, math.sqrt(2) * t.cos() * t.sin(), t.sin() ** 2)
    left.plot(*ring, color=COLOURS[2], linewidth=2, label="X = u uᵀ, |u| = 1")
    left.scatter([1], [0], [0], color=COLOURS[0], s=36, label="Y = e₁e₁ᵀ")
    left.quiver(1, 0, 0, 0, 0, 1, color=COLOURS[1], linewidth=2, label="N = e₂e₂ᵀ")
    left.set(xlabel="W₁₁", ylabel="√2 W₁₂", zlabel="W₂₂", title="Symmetric 2 x 2, rank 1, PSD")
    left.set(xticks=[0, 0.5, 1, 1.5], yticks=[-1, 0, 1], zticks=[0, 0.5, 1, 1.5])
    left.view_init(elev=22, azim=-50)
    left.legend(loc="upper left")

    x = torch.linspace(0.0, 1.0, 200)
    right.plot(x, x, color=COLOURS[0], label="L3.4 with ½: equality on the circle")
    right.plot(x, 0.9 * x, "--", color=COLOURS[2], label="0.9 of it: violated by the circle")
    seeds = range(400)
    evidence = [check(sample(seed, dtype, device)) for seed in seeds]
    points = [(e.bound, e.measured) for e in evidence if e.bound < 1]
    right.scatter(
        *zip(*points, strict=True), s=12, color=COLOURS[1], alpha=0.6, label="random pairs"
    )
    sharp = [check(attained(seed, dtype, device)) for seed in range(60)]
    circle_points = [(e.bound, e.measured) for e in sharp if e.bound < 1]
    right.scatter(
        *zip(*circle_points, strict=True), s=16, marker="D", color=COLOURS[2], label="circle"
    )
    right.set(xlabel="‖N‖₂ ‖X - Y‖² / (2σ_r(Y))", ylabel="⟨X - Y, N⟩, ‖N‖_F = 1", xlim=(0, 1))
    right.set(ylim=(0, 1.05), title="Measured against bound")
    right.legend(loc="upper left")
    return fig


CLAIM = Claim(
    id="geometry/prox-regularity",
    title="Sharp prox-regularity of M_r, near and far",
    statement=r"\langle X-Y,N\rangle\le\frac{\|N\|_2\,\|X-Y\|_F^2}{2\sigma_r(Y)}",
    hypotheses=("rank Y = r", "N normal to M_r at Y", "rank X <= r"),
    source=Source("ours", "mathematics L3.4"),
    sample=sample,
    check=check,
    extremal=(Extremal(attained),),
    controls=(
        Control("0.9 of ½, on the circle", partial(check, constant=0.9 * CONSTANT), attained),
        Control("N not normal", check, not_normal),
    ),
    trials=240,
    figure=figure,
    float32="64 eps (‖X - Y‖ + bound): N is normal to eps, ‖N‖_F = 1",
)
