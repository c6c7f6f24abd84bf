r"""C3.5 with σ_r at the other point.

**Statement.** For X, Y of rank r, d = ‖X - Y‖₂,

    ‖(I - P_Y) X‖_F <= d ‖X - Y‖_F / sqrt(2 σ_r(X)² - d²)   for d < √2 σ_r(X),
    ‖(I - P_Y) X‖_F <= d ‖X - Y‖_F / σ_r(X)                 always.

**Proof.** N = (I - P_Y)X = A X⁺ B with A = (I - P_{U_Y}) X, B = X (I - P_{V_Y}); also
A = (I - P_{U_Y})(X - Y), B = (X - Y)(I - P_{V_Y}), of spectral norm at most d. So with σ = σ_r(X)
‖N‖ <= d min(‖A‖, ‖B‖)/σ, which is the second line (Wei et al., lemma 4.1). For the first, the
blocks of X - Y outside of the spaces of Y are those of X:
‖X - Y‖² >= ‖A‖² + ‖B‖² - ‖N‖² >= (2σ²/d² - 1) ‖N‖². ∎

The first is the better one for d < σ_r(X): the constant falls from 1 to 1/√2 near X.

**Sharp** at both ends: on the circle of L3.4 with Y replaced by P_{U_Y} X P_{V_Y}, θ → 0, and for
U_Y ⊥ U_X, V_Y ⊥ V_X, Y → 0, where d = σ. First line ours, second published. mathematics 3.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from lrmanifold import Factors

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, largest
from ..sampling import Draw, dense, eps
from ._pairs import circle, pair, smallest, tangent

TWO = 2.0
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return pair(seed, dtype, device, both_sides=True, **fixed)


def check(sample: Sample, *, half: float = 0.5, factor: float = 1.0) -> Evidence:
    X, Y, D = sample["X"], sample["Y"], sample["D"]
    measured = (D - tangent(Y, D)).norm()  # (I - P_Y) Y = 0, and D is not the larger of the two
    sigma, d = float(smallest(X)), float(torch.linalg.matrix_norm(D, 2))
    # Where d >= σ the second line is the smaller one, or the only one.
    root = largest((sigma**2 / half - d**2, sigma**2))
    bound = factor * d * float(D.norm()) / math.sqrt(root)
    tolerance = ROUNDING * eps(D) * (float(D.norm()) + bound)
    return inequality(measured, bound, tolerance=tolerance)


def near(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Rank 1, θ small, Y the nearest point of the turned spaces: the limit 1/√2."""
    draw = Draw(seed, dtype, device)
    theta = draw.uniform(0.01, 0.03)
    given = circle(theta, 1.0, dtype, device)
    X, Y = given["X"], given["Y"]
    Y = Factors(Y.U, Y.U.mT @ dense(X) @ Y.V, Y.V)
    return {"X": X, "Y": Y, "D": dense(X) - dense(Y)}


def orthogonal(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Y small and orthogonal to X on both sides: d = σ_r(X), the constant 1."""
    draw = Draw(seed, dtype, device)
    given = circle(math.pi / 2, draw.log_uniform(0.1, 10.0), dtype, device)
    Y = given["Y"]._replace(S=0.1 * given["Y"].S)
    return {"X": given["X"], "Y": Y, "D": dense(given["X"]) - dense(Y)}


CLAIM = Claim(
    id="geometry/normal-component-other-point",
    title="The same with σ_r at the other point",
    statement=r"\|(I-P_Y)X\|_F\le\frac{d\,\|X-Y\|_F}{\sqrt{\max(2\sigma_r(X)^2-d^2,\,\sigma_r(X)^2)}},"
    r"\quad d=\|X-Y\|_2",
    hypotheses=("rank X = rank Y = r",),
    source=Source("ours", "sharpens Wei, Cai, Chan, Leung 2016, lemma 4.1; mathematics C3.5"),
    sample=sample,
    check=check,
    extremal=(Extremal(near), Extremal(orthogonal)),
    controls=(
        Control("0.9 of the constant, near pairs", partial(check, factor=0.9), near),
        Control("0.9 of the constant, orthogonal pairs", partial(check, factor=0.9), orthogonal),
        Control("3σ² in place of 2σ²", partial(check, half=1.0 / 3.0), near),
    ),
    trials=240,
    float32="64 eps (‖X - Y‖ + bound): P_Y is a projector to eps",
)
