r"""Corollary A2: following a given path A(t), whose increments alone are seen.

**Statement.** For Ẏ = P_Y Ȧ(t), Y(0) = Π_r A(0), ‖Ȧ‖ <= μ and ε <= s/2,

    ‖Y - A‖ <= ε (2 e^{μt/s} - 1) <= 2ε e^{μt/s}.

**Proof.** λ = ℓ = 0 in theorem A: a = μ/s, b = μ/(s - ε) <= 2a. ∎

The exponent is the one of the sharp example (see ``exponent.py``). Koch and Lubich (2007,
theorem 5.1, from memory) have 2βe^{βt}∫‖X - A‖ with β = 8μ/ρ, for a limited time; see
``koch_lubich.py``. Source: mathematics 4.1, A2 (ours; there without the -1).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ._evidence import along_paths, below
from .a_priori import measured
from .extremal import constant_defect
from .problems import Problem, problem

FACTOR = 2.0
OFFSET = 1.0
GROWTH = 1.0
SHARE = 0.5


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return {"problem": problem(seed, device, families=("prescribed path",), **fixed)}


def check(sample: Sample, *, factor: float = FACTOR, growth: float = GROWTH) -> Evidence:
    at: Problem = sample["problem"]
    q, c = measured(at)
    met = (below(c["eps"], SHARE * c["s"]) & below(q["tail"], q["s_X"])).all(0)
    bound = c["eps"] * (factor * (growth * c["mu"] / c["s"] * q["t"]).exp() - OFFSET)
    detail = {"with 2ε exp instead": float((q["distance"] / (bound + OFFSET * c["eps"])).max())}
    return along_paths(q["distance"], bound, met, reason="ε > s/2", detail=detail)


CLAIM = Claim(
    id="approximation/prescribed-path",
    title="A2: ‖Y - A‖ <= ε (2 exp(μt/s) - 1) on a given path",
    statement=r"\|Y-A\|\le\varepsilon\,\big(2e^{\mu t/s}-1\big)",
    hypotheses=("Ẏ = P_Y Ȧ, ‖Ȧ‖ <= μ", "‖A - X‖ <= ε <= s/2", "s <= σ_r(X), σ_r(Y)"),
    source=Source("ours", "mathematics 4.1, A2, sharpened by the -1"),
    sample=sample,
    check=check,
    extremal=(Extremal(partial(constant_defect, horizon=0.02)),),
    controls=(
        Control(
            "0.9 of the 2, which t = 0 needs",
            partial(check, factor=0.9 * FACTOR),
            partial(constant_defect, horizon=0.02),
        ),
        Control(
            "no growth: 2ε - ε",
            partial(check, growth=0.0),
            partial(constant_defect, tail=0.02, turning=True, horizon=3.0),
        ),
    ),
    loose={"growth": 0.188},
    trials=18,
    float32="float64 only: the comparison needs e >> rounding, and says nothing about float32",
)
