r"""A convex potential layer is 1-Lipschitz.

**Statement.** Let ‖Q‖₂ <= 1 and D diagonal with entries in [0, 1], the slopes of a nondecreasing
1-Lipschitz activation. Then ‖I - 2 Qᵀ D Q‖₂ <= 1, so x - 2 Qᵀσ(Q x + b) never stretches.

**Proof.** 0 <= Qᵀ D Q <= Qᵀ Q <= I, so the eigenvalues of I - 2 Qᵀ D Q lie in [-1, 1]. ∎

mathematics 9 (published: Meunier et al. 2022).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps

STEP = 2.0
ROUNDING = 50.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(full_rank=True)
    W = draw.normal(m, r) @ draw.normal(r, n)
    Q = W / torch.linalg.matrix_norm(W, 2)
    slopes = draw.shares(m)
    if draw.choose(True, False):
        slopes = slopes.round()
    return {"Q": draw.give(Q), "slopes": draw.give(slopes)}


def open_gates(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """All slopes 1: the layer is a reflection on the row space."""
    found = dict(sample(seed, dtype, device))
    return {**found, "slopes": torch.ones_like(found["slopes"])}


def check(sample: Sample, *, step: float = STEP) -> Evidence:
    Q, D = sample["Q"], sample["slopes"]
    eye = torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)
    J = eye - step * Q.mT @ (D[:, None] * Q)
    return inequality(torch.linalg.matrix_norm(J, 2), 1.0, tolerance=ROUNDING * eps(Q))


CLAIM = Claim(
    id="certification/convex-potential",
    title="‖I - 2 Qᵀ D Q‖ <= 1",
    statement=r"\|I-2Q^\top DQ\|_2\le1",
    hypotheses=("‖Q‖₂ <= 1", "slopes in [0, 1]"),
    source=Source("published", "Meunier, Delattre, Araujo, Allauzen 2022; mathematics 9"),
    sample=sample,
    check=check,
    extremal=(Extremal(open_gates),),
    controls=(Control("a step of 2.1", partial(check, step=2.1), open_gates),),
    # A shorter step is a weaker statement; a longer one is the control.
    loose={"step": 0.0},
    trials=60,
    float32="50 eps: a product and a spectral norm",
)
