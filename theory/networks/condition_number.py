r"""The condition number of a map at a point is a Jacobian norm.

**Statement.** For f differentiable at x, x ≠ 0, f(x) ≠ 0,

    cond(f; x) := limsup_{δ→0} (‖f(x+δ) - f(x)‖/‖f(x)‖) / (‖δ‖/‖x‖) = ‖J_f(x)‖₂ ‖x‖/‖f(x)‖.

**Proof.** f(x+δ) - f(x) = Jδ + o(‖δ‖), and sup ‖Jδ‖/‖δ‖ = ‖J‖₂, attained at the right singular
vector of the largest singular value. ∎

Checked three ways: the central difference along that vector gives the value, no random direction
gives more, and ``lrmanifold.robustness.condition_number`` (Lanczos, J never formed) agrees.
mathematics 6 (classical).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lrmanifold import robustness

from ..core import Claim, Control, Evidence, Sample, Source, identity, largest
from ..sampling import Draw, eps
from .random_networks import jacobian

DIRECTIONS = 32
ROUNDING = 2.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Two-layer tanh nets, x -> W₂ tanh(W₁x + b₁) + b₂."""
    draw = Draw(seed, dtype, device, **fixed)
    n, k, m = (int(draw.fixed.get(key, draw.integer(2, 8))) for key in ("n", "k", "m"))
    shapes = {"W1": (k, n), "b1": (k,), "W2": (m, k), "b2": (m,), "x": (n,)}
    given = {key: draw.give(draw.normal(*shape)) for key, shape in shapes.items()}
    return {**given, "directions": draw.give(draw.normal(DIRECTIONS, n))}


def net(s: Sample, x: Tensor) -> Tensor:
    """f(x), for one vector or a batch."""
    return torch.tanh(x @ s["W1"].mT + s["b1"]) @ s["W2"].mT + s["b2"]


def formula(f, x: Tensor, ord: int | str = 2) -> Tensor:
    """‖J_f(x)‖ ‖x‖/‖f(x)‖."""
    return torch.linalg.matrix_norm(jacobian(f, x), ord) * x.norm() / f(x).norm()


def check(sample: Sample, *, ord: int | str = 2) -> Evidence:
    f, x = partial(net, sample), sample["x"]
    claimed = float(formula(f, x, ord))
    unit = eps(x) ** (1.0 / 3.0)

    def amplified(v: Tensor) -> Tensor:
        step = unit * x.norm() * v / v.norm(dim=-1, keepdim=True)
        difference = f(x + step) - f(x - step)
        return difference.norm(dim=-1) / f(x).norm() / (2.0 * unit)

    worst = torch.linalg.svd(jacobian(f, x)).Vh[:1]
    attained = float(amplified(worst)[0])
    random = float(amplified(sample["directions"]).max())
    library = float(robustness.condition_number(f, x[None])[0])
    deviation = largest(
        (abs(attained / claimed - 1.0), random / claimed - 1.0, abs(library / claimed - 1.0))
    )
    # Central differences with step eps^(1/3): truncation and rounding are both eps^(2/3), magnified
    # by ‖W₁‖³‖x‖² (third derivative) and by 1/cond.
    scale = 1.0 + float((torch.linalg.matrix_norm(sample["W1"], 2) * x.norm()) ** 2)
    tolerance = ROUNDING * unit**2 * (scale + 1.0 / claimed)
    detail = {
        "attained": attained / claimed,
        "largest random": random / claimed,
        "library": library / claimed,
    }
    return identity(deviation, tolerance=tolerance, detail=detail)


CLAIM = Claim(
    id="networks/condition-number",
    title="cond(f; x) is a Jacobian norm",
    statement=r"\mathrm{cond}(f;x)=\|J_f(x)\|_2\,\|x\|\,/\,\|f(x)\|",
    hypotheses=("f differentiable at x", "x ≠ 0, f(x) ≠ 0"),
    source=Source("classical", "mathematics 6"),
    sample=sample,
    check=check,
    controls=(
        Control(
            "Frobenius norm of the Jacobian",
            partial(check, ord="fro"),
            partial(sample, n=6, k=8, m=6),
        ),
    ),
    trials=60,
    float32="2 eps^(2/3) (1 + ‖W₁‖²‖x‖² + 1/cond): central differences with step eps^(1/3)",
    kind="identity",
)
