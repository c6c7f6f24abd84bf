r"""Corollary A3: for strongly convex losses, near the full flow for ever.

**Statement.** If F is ℓ-Lipschitz with λ = -m < 0, m > μ/s, and ε <= s/2, then for all t

    ‖Y - W‖ <= ε [1 + (ℓ + 2μ/s)/(m - μ/s)].

**Proof.** a = μ/s - m < 0 in theorem A, so (e^{at} - 1)/a <= 1/(m - μ/s); b <= ℓ + 2μ/s. ∎

Checked on quadratics that start near their minimum, up to t = 8/m. Source: mathematics 4.1, A3
(ours).
"""

from __future__ import annotations

from functools import partial

import torch

from ..core import Claim, Control, Evidence, Sample, Source
from ._evidence import along_paths, below
from .a_priori import measured
from .extremal import attracted_path
from .problems import Problem, problem

LIPSCHITZ = 1.0  # of ℓ in the numerator
BEND = 2.0  # of μ/s there
SHARE = 0.5


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Quadratics with Hessian between 0.5 and 2, started near their minimum."""
    options = {
        "lowest_curvature": 0.5,
        "change": 0.05 + 0.02 * (seed % 8),
        "horizon": 16.0,
        **fixed,
    }
    return {"problem": problem(seed, device, families=("quadratic",), **options)}


def check(sample: Sample, *, lipschitz: float = LIPSCHITZ, curvature: float = BEND) -> Evidence:
    at: Problem = sample["problem"]
    assert at.lipschitz is not None
    assert at.one_sided is not None
    q, c = measured(at)
    m, bend = -at.one_sided, c["mu"] / c["s"]
    met = (below(c["eps"], SHARE * c["s"]) & below(bend, m) & below(q["tail"], q["s_X"])).all(0)
    bound = c["eps"] * (1.0 + (lipschitz * at.lipschitz + curvature * bend) / (m - bend))
    detail = {"μ/s over m": float((bend / m)[:, met].mean()) if bool(met.any()) else None}
    reason = "m <= μ/s or ε > s/2"
    return along_paths(q["distance"], bound, met, reason=reason, detail=detail)


CLAIM = Claim(
    id="approximation/strongly-convex",
    title="A3: uniformly in time for strongly convex losses",
    statement=r"\sup_t\|Y-W\|\le\varepsilon\Big[1+\frac{\ell+2\mu/s}{m-\mu/s}\Big]",
    hypotheses=("F is ℓ-Lipschitz, λ = -m", "m > μ/s", "‖W - X‖ <= ε <= s/2"),
    source=Source("ours", "mathematics 4.1, A3"),
    sample=sample,
    check=check,
    controls=(
        Control(
            "without ℓ, from the minimum",
            partial(check, lipschitz=0.0),
            partial(sample, change=0.0, noise=2e-3),
        ),
        Control(
            "without 2μ/s, on a path",
            partial(check, curvature=0.0),
            partial(attracted_path, tail=0.45, attraction=3.0, horizon=2.0),
        ),
    ),
    loose={"lipschitz": 0.0078, "curvature": 0.031},
    trials=16,
    float32="float64 only: the comparison needs e >> rounding, and says nothing about float32",
)
