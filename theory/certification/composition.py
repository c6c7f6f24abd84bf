r"""Lipschitz constants multiply along a chain, and a residual layer adds 1.

**Statement.** Let f be a chain of layers x → σ(W x), or x → x + σ(W x), with 1-Lipschitz σ. Then

    ‖f(x) - f(y)‖ <= Π ‖W_i‖₂ ‖x - y‖,    or    Π (1 + ‖W_i‖₂) ‖x - y‖.

**Proof.** Lipschitz constants of compositions multiply and of sums add. ∎

Attained by linear layers of rank 1 that pass their largest direction on. mathematics 9 (classical).
"""

from __future__ import annotations

import math
from functools import partial

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import eps
from ._networks import aligned, body, norms, random_network

CONSTANT = 1.0
ROUNDING = 200.0


def check(sample: Sample, *, constant: float = CONSTANT, skipped: int = 0) -> Evidence:
    x, y = sample["x"], sample["x"] + sample["step"]
    change = body(sample, y) - body(sample, x)
    bound = constant * math.prod(norms(sample)[skipped:]) * float((y - x).norm())
    size = math.prod(norms(sample)) * float(x.norm() + y.norm())
    return inequality(change.norm(), bound, tolerance=ROUNDING * eps(x) * size)


CLAIM = Claim(
    id="certification/composition",
    title="‖f(x) - f(y)‖ <= Π ‖W_i‖ ‖x - y‖, 1 + ‖W‖ for a residual layer",
    statement=r"\|f(x)-f(y)\|\le\prod_i\|W_i\|_2\,\|x-y\|",
    hypotheses=("activations with slopes in [-1, 1]",),
    source=Source("classical", "mathematics 9"),
    sample=random_network,
    check=check,
    extremal=(Extremal(aligned),),
    controls=(
        Control("0.99 of it", partial(check, constant=0.99), aligned),
        Control("one layer larger than 1 forgotten", partial(check, skipped=1), aligned),
    ),
    trials=80,
    float32="200 eps of the product of the norms and the inputs: rounding of both forward passes",
)
