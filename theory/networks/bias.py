r"""Biases: no bound by κ(W), but one by the augmented matrix.

**Statement.** For the affine layer x -> Wx + b with Jacobian W, x~ = (x, 1) and W~ = [W b],

    ‖W‖₂‖x‖/‖Wx + b‖ <= κ(W~)/cos θ(x~, row W~).

No function of κ(W) bounds it: Wx may be near -b.

**Proof.** ‖W‖ <= ‖W~‖, ‖x‖ <= ‖x~‖, and Wx + b = W~x~ with ‖W~x~‖ >= σ_min⁺(W~) ‖P_row x~‖. ∎

Approached as b → 0 (control). A BatchNorm in evaluation mode is a diagonal affine layer, so it is
covered; in training mode it is not. mathematics 6 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality
from ..sampling import Draw, eps

CONSTANT = 1.0
ROUNDING = 100.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Low-rank or full W; every third sample has Wx near -b."""
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(full_rank=True)
    W = draw.frame(m, r) @ draw.core(draw.spectrum(r, draw.cond(1.0, 100.0))) @ draw.frame(n, r).mT
    x, b = draw.normal(n), draw.uniform(0.1, 3.0) * draw.normal(m)
    if seed % 3 == 0:
        b = -W @ x + 1e-2 * draw.normal(m)
    return {"W": draw.give(W), "b": draw.give(b), "x": draw.give(x), "r": r}


def cancelling(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Wx + b = 10⁻² of a random vector."""
    return sample(3 * seed, dtype, device)


def small_bias(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """A square well-posed W, its smallest right singular vector, and almost no bias."""
    draw = Draw(seed, dtype, device)
    n = draw.integer(2, 8)
    Q = draw.frame(n, n)
    W = (draw.frame(n, n) * draw.spectrum(n, 5.0)) @ Q.mT
    x = 1e4 * Q[:, -1]
    return {"W": draw.give(W), "b": draw.give(1e-4 * draw.normal(n)), "x": draw.give(x), "r": n}


def check(sample: Sample, *, constant: float = CONSTANT, augmented: bool = True) -> Evidence:
    W, b, x = sample["W"], sample["b"], sample["x"]
    y = W @ x + b
    measured = torch.linalg.matrix_norm(W, 2) * x.norm() / y.norm()
    if augmented:
        W, x = torch.cat((W, b[:, None]), -1), torch.cat((x, torch.ones_like(x[:1])))
    # The rank is known: [W b] has one more than W, unless W has full row rank.
    rank = min(sample["r"] + (1 if augmented else 0), *W.shape)
    _, s, Vh = torch.linalg.svd(W, full_matrices=False)
    kappa = s[0] / s[rank - 1]
    bound = constant * kappa * x.norm() / (Vh[:rank] @ x).norm()
    # y is known to eps ‖W~‖‖x~‖, and s[rank-1] to eps ‖W~‖.
    relative = ROUNDING * eps(x) * float(s[0] * x.norm() / y.norm() + kappa)
    return inequality(measured, bound, tolerance=relative * float(bound))


CLAIM = Claim(
    id="networks/bias",
    title="Affine layers: κ of the augmented matrix, not of W",
    statement=(
        r"\frac{\|W\|_2\|x\|}{\|Wx+b\|}\le\frac{\kappa([W\,b])}"
        r"{\cos\theta(\tilde x,\mathrm{row}[W\,b])},\quad \tilde x=(x,1)"
    ),
    hypotheses=("Wx + b ≠ 0",),
    source=Source("ours", "mathematics 6"),
    sample=sample,
    check=check,
    extremal=(Extremal(small_bias),),
    controls=(
        Control("κ(W)/cos θ(x, row W)", partial(check, augmented=False), cancelling),
        Control("0.9 of it, bias near 0", partial(check, constant=0.9), small_bias),
    ),
    trials=60,
    float32="100 eps (‖W~‖‖x~‖/‖Wx + b‖ + κ(W~)) relative: Wx + b cancels",
)
