r"""Loss descent: an augmented-BUG step never raises the loss; only truncation can.

**Statement.** Let F = -∇L and let the S-step of augmented BUG be solved exactly. Before truncation,

    L(Ŷ₁) = L(Y₀) - ∫₀ʰ ‖Ûᵀ∇L(ÛŜ(t)V̂ᵀ)V̂‖² dt <= L(Y₀),

for every step size h, every smooth L, and whatever the K- and L-steps did.

**Proof.** Û ⊇ U₀ and V̂ ⊇ V₀, so the S-step starts from Ŝ(0) = ÛᵀY₀V̂ with ÛŜ(0)V̂ᵀ = Y₀ exactly.
It is the gradient flow of Ŝ -> L(ÛŜV̂ᵀ). ∎

BUG itself starts its S-step from a projection of Y₀, and truncation changes Ŷ₁: both can raise the
loss (controls). Checked, the equality and the inequality, on weighted least squares and matrix
completion with a quartic term, steps up to h = 4, substeps of h/64; the integral goes along with Ŝ.
mathematics 7 (Ceruti, Kusch and Lubich 2022, of the same form).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lrmanifold import Factors

from ..core import Claim, Control, Evidence, Sample, Source, inequality, violated
from ..sampling import Draw, eps
from .schemes import augmented, augmented_bug, bug, dense, flow

SUBSTEPS = 64
ROUNDING = 64.0
QUADRATURE = 1e-6  # of the integral, beside what a quarter of the substeps changes
STEPS = {"augmented BUG": augmented, "truncated": augmented_bug, "BUG": bug}


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """L(W) = ½‖weights ∘ (W - A)‖² + quartic/4 Σ W_ij⁴, the weights 0 or 1 for completion."""
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(3, 8)
    random = draw.shares(m, n)
    weights = (random < 0.6).double() if seed % 2 else 0.1 + random
    return {
        "weights": draw.give(weights),
        "A": draw.give(draw.normal(m, n)),
        "quartic": draw.choose(0.0, 0.05),
        "Y": draw.give_point(draw.point(m, n, r, draw.cond(1.0, 3.0))),
        "h": draw.log_uniform(1e-3, 4.0),
    }


def loss(s: Sample, W: Tensor) -> Tensor:
    """L(W)."""
    quadratic = 0.5 * (s["weights"] * (W - s["A"])).square().sum()
    return quadratic + 0.25 * s["quartic"] * W.pow(4).sum()


def force(s: Sample, t: float, W: Tensor) -> Tensor:
    """-∇L(W)."""
    return -s["weights"].square() * (W - s["A"]) - s["quartic"] * W.pow(3)


def dissipated(s: Sample, U: Tensor, V: Tensor, substeps: int) -> Tensor:
    """∫₀ʰ ‖Uᵀ∇L(USVᵀ)V‖² dt along the S-step in these bases, integrated beside S."""
    (U_0, S_0, V_0), r = s["Y"], (U.shape[-1], V.shape[-1])

    def rate(t: float, y: Tensor) -> Tensor:
        G = U.mT @ force(s, t, U @ y[:-1].unflatten(0, r) @ V.mT) @ V
        return torch.cat((G.flatten(), G.square().sum()[None]))

    start = ((U.mT @ U_0) @ S_0 @ (V_0.mT @ V)).flatten()
    return flow(rate, 0.0, s["h"], torch.cat((start, 0.0 * start[:1])), substeps)[-1]


def check(sample: Sample, *, scheme: str = "augmented BUG") -> Evidence:
    s, F = sample, partial(force, sample)
    Y = STEPS[scheme](F, 0.0, s["h"], s["Y"], substeps=SUBSTEPS)
    before, after = loss(s, dense(s["Y"])), loss(s, dense(Y))
    tolerance = ROUNDING * eps(s["A"]) * float(before)
    if scheme == "augmented BUG":
        lost, coarse = (dissipated(s, Y.U, Y.V, n) for n in (SUBSTEPS, SUBSTEPS // 4))
        missed = {"loss that went elsewhere": (before - after - lost).abs()}
        quadrature = QUADRATURE * float(lost) + float((lost - coarse).abs())
        if (found := violated(missed, tolerance + quadrature)) is not None:
            return found
    return inequality(after, before, tolerance=tolerance)


def near_minimum(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """The first problem from `seed` on at which truncation raises the loss.

    Near a minimum on M_r: there the loss has nothing to lose along M_r, but much along the new
    directions, which truncation takes away again.
    """
    for k in range(100):
        found = dict(sample(1000 * (seed + 1) + k, dtype, device))
        for _ in range(30):
            found["Y"] = augmented_bug(partial(force, found), 0.0, 0.3, found["Y"])
        found["h"] = 3.0
        if not check(found, scheme="truncated").holds:
            return found
    raise RuntimeError("no rise of the loss found")


def misleading_bases(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """½‖W - A‖² with A = [[1, 1], [1, -3]] from Y₀ = e₁e₁ᵀ: u₁ ∝ Av₀, v₁ ∝ Aᵀu₀, but u₁ᵀAv₁ = 0.

    A long BUG step ends at W = 0, loss 6, from loss 5.5.
    """
    draw = Draw(seed, dtype, device)
    P, Q = draw.frame(4, 2), draw.frame(3, 2)
    core = torch.tensor([[1.0, 1.0], [1.0, -3.0]], dtype=torch.float64)
    S = torch.ones(1, 1, dtype=torch.float64)
    return {
        "weights": draw.give(torch.ones(4, 3)),
        "A": draw.give(P @ core @ Q.mT),
        "quartic": 0.0,
        "Y": draw.give_point(Factors(P[:, :1], S, Q[:, :1])),
        "h": 4.0,
    }


CLAIM = Claim(
    id="integrators/descent",
    title="Augmented BUG never raises the loss before truncation",
    statement=r"L(\hat Y_1)=L(Y_0)-\int_0^h\|\hat U^\top\nabla L\,\hat V\|^2\,dt\le L(Y_0)",
    hypotheses=("F = -∇L", "exact S-step", "any step size"),
    source=Source("published", "Ceruti, Kusch and Lubich 2022; mathematics 7"),
    sample=sample,
    check=check,
    controls=(
        Control("after truncation", partial(check, scheme="truncated"), near_minimum),
        Control("BUG without augmentation", partial(check, scheme="BUG"), misleading_bases),
    ),
    trials=60,
    float32="64 eps L(Y₀): the loss is a sum of squares, each rounded once",
)
