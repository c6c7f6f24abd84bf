r"""Corollary A5: no assumption on the low-rank model's own singular values.

**Statement.** Drop σ_r(Y) >= s from theorem A and keep σ_r(X) >= s. With a = λ + 3μ/(2s),
b = ℓ + μ/(s - ε) and E(t) = ε b (e^{at} - 1)/a, as long as E(t) <= s/2,

    ‖Y - X‖ <= E(t)    and    σ_r(Y) >= s - E(t) >= s/2.

**Proof.** Weyl: σ_r(Y) >= σ_r(X) - e >= s - e. While e <= s/2, κ <= ½ (μ/(s/2) + μ/s) = 3μ/(2s), so
e <= E; the set of times with e <= s/2 is closed, and open in {E < s/2}. ∎

Sharp in b: the flow in the control loses σ_r(Y) at speed ℓε while X rests. Source: mathematics 4.1,
A5 (ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ._evidence import ROUNDING, along_paths, below
from .a_priori import growth, measured, short
from .a_priori import sample as draw
from .problems import Problem

CURVATURE = 1.5  # of μ/s in a
SIZE = 1.0  # of b
SHARE = 0.5  # E <= s/2


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return draw(seed, dtype, device, **fixed)


def check(sample: Sample, *, size: float = SIZE, curvature: float = CURVATURE) -> Evidence:
    at: Problem = sample["problem"]
    assert at.lipschitz is not None
    assert at.one_sided is not None
    q, c = measured(at)
    s = q["s_X"].cummin(0).values
    met = (below(c["eps"], s) & below(q["tail"], q["s_X"])).all(0)
    a = at.one_sided + curvature * c["mu"] / s
    b = size * (at.lipschitz + c["mu"] / (s - c["eps"]))
    E = c["eps"] * b * growth(a, q["t"])
    valid = below(E, SHARE * s)
    # Both conclusions in one number: how far e, or the loss of σ_r below s, reaches into E.
    lost = torch.maximum(q["e"], (s - q["s_Y"]).clamp_min(0.0))
    detail = {"problem": at.name, "share of time with E <= s/2": float(valid.double().mean())}
    bound = torch.where(valid, E, E + lost + ROUNDING)
    return along_paths(lost, bound, met & valid[1:].any(0), reason="E > s/2", detail=detail)


CLAIM = Claim(
    id="approximation/unknown-gap",
    title="A5: σ_r(Y) >= s - E(t), nothing assumed of Y",
    statement=(
        r"E(t)=\varepsilon b\frac{e^{at}-1}{a}\le\tfrac s2\ \Rightarrow\ \|Y-X\|\le E,\ "
        r"\sigma_r(Y)\ge s-E,\quad a=\lambda+\tfrac{3\mu}{2s}"
    ),
    hypotheses=("‖F‖ <= μ, F is ℓ-Lipschitz", "‖W - X‖ <= ε < s <= σ_r(X)", "E(t) <= s/2"),
    source=Source("ours", "mathematics 4.1, A5"),
    sample=sample,
    check=check,
    extremal=(Extremal(short(falling=True)),),
    controls=(
        Control("0.9 of b, σ_r(Y) falling", partial(check, size=0.9 * SIZE), short(falling=True)),
    ),
    loose={"curvature": 0},
    trials=18,
    float32="float64 only: the comparison needs e >> rounding, and says nothing about float32",
)
