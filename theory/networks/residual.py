r"""Residual blocks: an identity makes a small branch well-conditioned.

**Statement.** Let g be q-Lipschitz with q < 1 and g(0) = 0. Then for f(x) = x + g(x)

    cond(f; x) <= (1 + q)/(1 - q).

For q >= 1 there is no bound.

**Proof.** ‖J_f‖ <= 1 + q; ‖f(x)‖ >= ‖x‖ - ‖g(x) - g(0)‖ >= (1 - q)‖x‖. ∎

Attained by g = diag(q, -q) at x = e₂. Source: mathematics 6 (classical).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, not_met
from ..sampling import Draw, eps
from .random_networks import condition

CONSTANT = 1.0
ROUNDING = 50.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """g(x) = q B tanh(A x) with ‖A‖ = ‖B‖ = 1, or the linear q BA."""
    draw = Draw(seed, dtype, device, **fixed)
    n, k = draw.integer(2, 8), draw.integer(2, 8)
    A, B = draw.normal(k, n), draw.normal(n, k)
    A, B = A / torch.linalg.matrix_norm(A, 2), B / torch.linalg.matrix_norm(B, 2)
    x = draw.log_uniform(0.01, 10.0) * draw.normal(n)
    q = draw.uniform(0.0, 0.98)
    linear = seed % 2 == 0
    return {"A": draw.give(A), "B": draw.give(q * B), "x": draw.give(x), "q": q, "linear": linear}


def opposite(
    seed: int, dtype: torch.dtype, device: torch.device, *, q: float | None = None
) -> Sample:
    """g = diag(q, -q), x = e₂."""
    draw = Draw(seed, dtype, device)
    q = draw.uniform(0.1, 0.95) if q is None else q
    A, B = torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([q, -q], dtype=torch.float64))
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return {"A": draw.give(A), "B": draw.give(B), "x": draw.give(x), "q": q, "linear": True}


def check(sample: Sample, *, constant: float = CONSTANT, formula: str = "quotient") -> Evidence:
    s, q = sample, sample["q"]
    if q >= 1.0:
        return not_met("q >= 1")

    def f(x: Tensor) -> Tensor:
        z = s["A"] @ x
        return x + s["B"] @ (z if s["linear"] else torch.tanh(z))

    bound = constant * ((1.0 + q) / (1.0 - q) if formula == "quotient" else 1.0 + q)
    tolerance = ROUNDING * eps(s["x"]) * bound / (1.0 - q)
    return inequality(condition(f, s["x"]), bound, tolerance=tolerance)


CLAIM = Claim(
    id="networks/residual",
    title="Residual blocks: cond <= (1+q)/(1-q)",
    statement=r"\mathrm{cond}(x+g(x);x)\le\frac{1+q}{1-q}",
    hypotheses=("g(0) = 0", "Lip(g) = q < 1"),
    source=Source("classical", "mathematics 6"),
    sample=sample,
    check=check,
    extremal=(Extremal(opposite),),
    controls=(
        Control("0.9 of it, g = diag(q, -q)", partial(check, constant=0.9), opposite),
        Control("1 + q: the denominator forgotten", partial(check, formula="norm"), opposite),
    ),
    trials=60,
    float32="50 eps/(1 - q) relative: x + g(x) cancels by at most that",
)
