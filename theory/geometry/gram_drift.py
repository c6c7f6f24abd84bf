r"""Why the true Gram matrix: orthogonality drift over many steps.

**Statement.** Let UᵀU = I + E and UᵀΔ = 0. For a step U⁺ = (U + Δ) R⁻¹ with RᵀR = G,

    G = I + ΔᵀΔ  (known increment)            U⁺ᵀU⁺ - I = R⁻ᵀ E R⁻¹: the defect is carried over,
    G = (U + Δ)ᵀ(U + Δ)  (true Gram matrix)   U⁺ᵀU⁺ - I = 0:         it is removed, each step.

So in floating point the first drifts: every step adds a rounding error of size u to what is there,
and the contraction by R⁻¹ = I + O(‖Δ‖²) is too weak for the steps of an optimizer. The second stays
below the bound of the claim cholesky-qr after any number of steps.

The drift is not even a random walk when ‖Δ‖⁴ is below u, as in float32: 1 + x is on the grid of
floating point numbers, so sqrt(1 + x) = 1 + x/2 - x²/8 is, every other time, just below the middle
between two of them and rounded down. U grows by u/2 a step on average, UᵀU by u (see the picture).

**Checked** twice: the two identities with a planted E of size 10⁻³; and STEPS steps from it of
random tangent increments in the working precision, after each of which the frame of the true Gram
matrix must be orthonormal within (5/64) δ², the one-step bound. Both cost the same.
mathematics 2 (ours).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Sample, Source, inequality, largest, violated
from ..sampling import Draw, eps
from .cholesky_qr import CONSTANT, defect

STEPS = 200
SIZE = 1e-2  # ‖Δ‖_F of one step
PLANTED = 1e-3
ROUNDING = 64.0


def gram(U: Tensor, Delta: Tensor, *, true: bool) -> Tensor:
    if true:
        A = U + Delta
        return A.mT @ A
    return torch.eye(U.shape[-1], dtype=U.dtype, device=U.device) + Delta.mT @ Delta


def step(U: Tensor, Delta: Tensor, *, true: bool) -> Tensor:
    L = torch.linalg.cholesky(gram(U, Delta, true=true))
    return torch.linalg.solve_triangular(L, (U + Delta).mT, upper=False).mT


def increments(U: Tensor, Z: Tensor) -> Tensor:
    """A step of size SIZE in direction Z, with UᵀΔ = 0 whatever the defect of U."""
    Delta = Z - U @ torch.linalg.solve(U.mT @ U, U.mT @ Z)
    return SIZE * Delta / Delta.norm()


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    n = int(draw.fixed.get("n", draw.integer(8, 40)))
    r = int(draw.fixed.get("r", draw.integer(2, 6)))
    E = draw.normal(r, r)
    E = PLANTED * (E + E.mT) / (E + E.mT).norm()
    U = draw.frame(n, r)
    bent = U @ torch.linalg.cholesky(torch.eye(r, dtype=E.dtype) + E).mT
    steps = draw.normal(STEPS, n, r)
    return {"U": draw.give(U), "bent": draw.give(bent), "steps": draw.give(steps)}


def history(U: Tensor, steps: Tensor, *, true: bool) -> list[float]:
    """‖UᵀU - I‖₂ after each step from U."""
    sizes = []
    for Z in steps:
        U = step(U, increments(U, Z), true=true)
        sizes.append(defect(U))
    return sizes


def check(sample: Sample, *, true: bool = True) -> Evidence:
    bent = sample["bent"]
    (n, r), unit = bent.shape, eps(bent) / 2
    Delta = increments(bent, sample["steps"][0])
    eye = torch.eye(r, dtype=bent.dtype, device=bent.device)
    E = bent.mT @ bent - eye
    L = torch.linalg.cholesky(gram(bent, Delta, true=False))
    carried = torch.linalg.solve_triangular(L, E, upper=False)
    carried = torch.linalg.solve_triangular(L, carried.mT, upper=False)
    old, new = (step(bent, Delta, true=kind) for kind in (False, True))
    identities = {
        "known increment": (old.mT @ old - eye - carried).norm(),
        "true Gram matrix": (new.mT @ new - eye).norm(),
    }
    if (found := violated(identities, ROUNDING * eps(bent) * r)) is not None:
        return found
    # cond(A)² <= 1 + ‖Δ‖² up to the defect itself
    bound = CONSTANT * 64.0 * (n * r + r * (r + 1)) * unit * (1.0 + 2.0 * SIZE**2)
    # From the planted defect: from a frame, 200 steps in float64 drift too little to be seen.
    sizes = history(bent, sample["steps"], true=true)
    return inequality(largest(sizes), bound, detail={"last": sizes[-1], "first": sizes[0]})


def figure(dtype: torch.dtype, device: torch.device):
    """Drift over 2000 steps in float32."""
    from ..plotting import COLOURS, new

    given = dict(sample(1, torch.float32, device, n=32, r=5))
    draw = Draw(2, torch.float32, device)
    given["steps"] = draw.give(draw.normal(2000, 32, 5))
    fig, axes = new(2, width=5.4, height=4.4, sharey=True)
    u = eps(torch.float32) / 2
    for ax, start in zip(axes, ("U", "bent"), strict=True):
        for true, colour, label in (
            (False, COLOURS[2], "G = I + ΔᵀΔ"),
            (True, COLOURS[1], "G = (U + Δ)ᵀ(U + Δ)"),
        ):
            sizes = history(given[start], given["steps"], true=true)
            ax.plot(range(1, len(sizes) + 1), sizes, color=colour, lw=1.1, label=label)
        ax.axhline(u, color=COLOURS[0], linestyle=":", lw=1, label="u = 6e-8")
        ax.set(xscale="log", yscale="log", xlabel="steps of size ‖Δ‖ = 0.01")
    axes[0].set(ylabel="‖UᵀU - I‖₂, float32", title="Start orthonormal to roundoff")
    axes[1].set(title=f"Start with a defect of {PLANTED:g}")
    axes[0].legend(loc="upper left")
    axes[1].legend(loc="center right")
    return fig


CLAIM = Claim(
    id="geometry/gram-drift",
    title="The true Gram matrix removes drift, the known increment carries it",
    statement=(
        r"U^\top U=I+E:\ \ R^\top R=I+\Delta^\top\Delta"
        r"\Rightarrow U_+^\top U_+-I=R^{-\top}ER^{-1};\ \ "
        r"R^\top R=(U+\Delta)^\top(U+\Delta)\Rightarrow \|U_+^\top U_+-I\|\le\tfrac5{64}\delta^2"
    ),
    hypotheses=("UᵀΔ = 0", "‖Δ‖ small"),
    source=Source("ours", "mathematics 2, on Yamamoto et al. 2015"),
    sample=sample,
    check=check,
    controls=(Control("I + ΔᵀΔ in place of the true Gram matrix", partial(check, true=False)),),
    trials=60,
    figure=figure,
    float32="no slack in the one-step bound; identities to 64 eps r",
)
