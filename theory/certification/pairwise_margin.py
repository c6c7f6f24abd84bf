r"""The radius that a margin proves.

**Statement.** Let z = A g(x), g with Lipschitz constant L, rows a_j of A. If z_y - z_j > 0 for all
j ≠ y, no x' with

    ‖x' - x‖ < min_j (z_y - z_j)/(L ‖a_y - a_j‖)

has another class.

**Proof.** (z_y - z_j)(x') >= (z_y - z_j)(x) - ‖a_y - a_j‖ ‖g(x') - g(x)‖. ∎

The check walks from x along the gradient of the smallest margin, as far as the radius, and takes
the largest ratio of the margin's fall and of the margin. Attained by linear chains of rank 1.
mathematics 9 (published: Leino et al. 2021).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, not_met, smallest
from ..sampling import eps
from ._networks import aligned, body, norms, random_network

CONSTANT = 1.0
ROUNDING = 500.0
STEPS = 24


def _fall(sample: Sample, x: Tensor, y: int, radius: float) -> float:
    """The smallest margin that ascent finds within the radius."""
    delta, least = torch.zeros_like(x), math.inf
    for k in range(STEPS + 1):
        delta = delta.detach().requires_grad_()
        z = body(sample, x + delta) @ sample["head"].mT
        margins = torch.cat((z[y] - z[:y], z[y] - z[y + 1 :]))
        margin = margins.min()
        least = smallest((least, margin.detach()))
        (g,) = torch.autograd.grad(margin, delta)
        size = float(g.norm())
        if size == 0.0:
            break
        delta = delta.detach() - (2.0 if k == 0 else 1.0 - k / STEPS) * radius * g / size
        length = float(delta.norm())
        if length > radius:
            delta = delta * (radius / length)
    return least


def check(sample: Sample, *, constant: float = CONSTANT, pairwise: bool = True) -> Evidence:
    x, A = sample["x"], sample["head"]
    z = body(sample, x) @ A.mT
    y = int(z.argmax())
    others = [j for j in range(len(z)) if j != y]
    L = math.prod(norms(sample))
    gaps = [float((A[y] - A[j]).norm() if pairwise else A[y].norm()) for j in others]
    margins = [float(z[y] - z[j]) for j in others]
    if L == 0.0 or smallest(margins) <= 0.0 or smallest(gaps) == 0.0:
        return not_met("no margin")
    radius = smallest(m / (L * g) for m, g in zip(margins, gaps, strict=True)) / constant
    least = _fall(sample, x, y, radius)
    tolerance = ROUNDING * eps(x) * (L * float(A.norm()) * (float(x.norm()) + radius))
    # the margin may fall by all of itself, and not below 0
    start = smallest(margins)
    return inequality(start - least, start, tolerance=tolerance)


CLAIM = Claim(
    id="certification/pairwise-margin",
    title="No class changes within min_j (z_y - z_j)/(L ‖a_y - a_j‖)",
    statement=r"\|x'-x\|<\min_j\frac{z_y-z_j}{L\,\|a_y-a_j\|}\Rightarrow\text{same class}",
    hypotheses=("g has Lipschitz constant L", "the margins are positive"),
    source=Source("published", "Leino, Wang, Fredrikson 2021; mathematics 9"),
    sample=random_network,
    check=check,
    extremal=(Extremal(aligned),),
    controls=(
        Control("a radius 1.05 times as large", partial(check, constant=1 / 1.05), aligned),
        Control("‖a_y‖ in place of ‖a_y - a_j‖", partial(check, pairwise=False), aligned),
    ),
    trials=60,
    float32="500 eps of the size of the logits",
)
