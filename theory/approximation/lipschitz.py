r"""Corollary A1: for any loss with Lipschitz gradient, within 2ε of the full flow, times a growth.

**Statement.** If F is ℓ-Lipschitz and ε <= s/2,

    ‖Y - W‖ <= ε (2 exp((ℓ + μ/s) t) - 1) <= 2ε exp((ℓ + μ/s) t).

**Proof.** λ <= ℓ, and (e^{at} - 1)/a grows with a, so take a = ℓ + μ/s in theorem A. By ε <= s/2,
b <= ℓ + 2μ/s <= 2a. Hence 1 + b (e^{at} - 1)/a <= 2 e^{at} - 1. ∎

The -1, which costs nothing, makes it exact at t = 0. Source: mathematics 4.1, A1 (ours; there
without the -1).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ._evidence import along_paths, below
from .a_priori import measured
from .a_priori import sample as draw
from .extremal import sharp_lipschitz
from .problems import Problem

FACTOR = 2.0
OFFSET = 1.0
GROWTH = 1.0  # of the exponent (ℓ + μ/s) t
SHARE = 0.5  # ε <= s/2


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return draw(seed, dtype, device, **fixed)


def check(sample: Sample, *, factor: float = FACTOR, growth: float = GROWTH) -> Evidence:
    at: Problem = sample["problem"]
    assert at.lipschitz is not None
    q, c = measured(at)
    met = (below(c["eps"], SHARE * c["s"]) & below(q["tail"], q["s_X"])).all(0)
    exponent = growth * (at.lipschitz + c["mu"] / c["s"])
    bound = c["eps"] * (factor * (exponent * q["t"]).exp() - OFFSET)
    detail = {"problem": at.name, "with 2ε exp instead": _plain(q["distance"], bound, c["eps"])}
    return along_paths(q["distance"], bound, met, reason="ε > s/2", detail=detail)


def _plain(distance, bound, eps) -> float:
    return float((distance / (bound + OFFSET * eps)).max())


CLAIM = Claim(
    id="approximation/lipschitz-loss",
    title="A1: ‖Y - W‖ <= ε (2 exp((ℓ + μ/s)t) - 1)",
    statement=r"\|Y-W\|\le\varepsilon\,\big(2e^{(\ell+\mu/s)t}-1\big)",
    hypotheses=("F is ℓ-Lipschitz, ‖F‖ <= μ", "‖W - X‖ <= ε <= s/2", "s <= σ_r(X), σ_r(Y)"),
    source=Source("ours", "mathematics 4.1, A1, sharpened by the -1"),
    sample=sample,
    check=check,
    extremal=(Extremal(partial(sharp_lipschitz, horizon=0.02)),),
    controls=(
        Control(
            "0.9 of the 2, which t = 0 needs",
            partial(check, factor=0.9 * FACTOR),
            partial(sharp_lipschitz, horizon=0.02),
        ),
        Control("no growth: 2ε - ε", partial(check, growth=0.0), sharp_lipschitz),
    ),
    loose={"growth": 0.21},
    trials=18,
    float32="float64 only: the comparison needs e >> rounding, and says nothing about float32",
)
