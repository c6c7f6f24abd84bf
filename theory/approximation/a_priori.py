r"""Theorem A, a-priori: the distance is at most a constant times what low rank costs at best.

**Statement.** Under the hypotheses of the certificate, with constants valid on all of [0, t]: ℓ a
Lipschitz constant of F, λ its one-sided one, ‖F(W)‖, ‖F(Y)‖ <= μ, ‖W - X‖ <= ε < s <= σ_r(X),
σ_r(Y),

    ‖Y - X‖ <= ε b (e^{at} - 1)/a,    ‖Y - W‖ <= ε [1 + b (e^{at} - 1)/a],
    a = λ + μ/s,    b = ℓ + μ/(s - ε).

**Proof.** In the certificate κ <= μ/s, and δ <= με/(s - ε) because σ_{r+1}(W) <= ε and
σ_r(W) - σ_{r+1}(W) >= s - ε. ∎

**Where it is loose.** μ bounds all of F, but only its part normal to M_r bends, and that part is
small while W stays near M_r: the measured κ is 2 to 20 times smaller than μ/s on these problems.
For small ε the exponent is λ alone: ``no_blow_up.py``. The net has no global λ, ℓ and is left to
the certificate. b is sharp as ε -> 0, t -> 0 (control). Source: mathematics 4.1 (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ._evidence import along_paths, below
from .extremal import constant_defect, sharp_lipschitz
from .flows import GRID, Measured, integrate, measure
from .problems import Problem, problem

CURVATURE = 1.0  # of μ/s in a
LIPSCHITZ = 1.0  # of ℓ in b
DEFECT = 1.0  # of μ/(s - ε) in b
WITH_CONSTANTS = ("quadratic", "completion", "prescribed path")


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    return {"problem": problem(seed, device, **{"families": WITH_CONSTANTS, **fixed})}


def measured(at: Problem, steps: int = 2 * GRID) -> tuple[Measured, dict[str, Tensor]]:
    """Quantities along the path with times ``t``, and the constants s, ε, μ, all (times, B).

    The theorem holds on [0, t] for every t, so the constants at t are the suprema up to t.
    """
    path = integrate(at, steps)
    q = dict(measure(at, path))
    q["t"] = path.times[:, None].expand_as(q["e"])
    s = torch.minimum(q["s_X"], q["s_Y"]).cummin(0).values
    eps, mu = q["eps"].cummax(0).values, q["mu"].cummax(0).values
    return q, {"s": s, "eps": eps, "mu": mu}


def growth(a: Tensor, t: Tensor) -> Tensor:
    """(e^{at} - 1)/a, also at a = 0."""
    small = a.abs() < 1e-12
    return torch.where(small, t, torch.expm1(a * t) / torch.where(small, torch.ones_like(a), a))


def check(
    sample: Sample,
    *,
    curvature: float = CURVATURE,
    lipschitz: float = LIPSCHITZ,
    defect: float = DEFECT,
) -> Evidence:
    at: Problem = sample["problem"]
    assert at.lipschitz is not None
    assert at.one_sided is not None
    q, c = measured(at)
    met = (below(c["eps"], c["s"]) & below(q["tail"], q["s_X"])).all(0)
    a = at.one_sided + curvature * c["mu"] / c["s"]
    b = lipschitz * at.lipschitz + defect * c["mu"] / (c["s"] - c["eps"])
    bound = c["eps"] * b * growth(a, q["t"])
    detail = {
        "problem": at.name,
        "κ / (μ/s), mean": float((0.5 * q["bend"] / (c["mu"] / c["s"]))[:, met].mean()),
    }
    return along_paths(q["e"], bound, met, reason="ε >= s or the gap closes", detail=detail)


def short(**options: float) -> Callable[[int, torch.dtype, torch.device], Sample]:
    """The flow in which ‖Y - X‖ = ℓεt, on a time so short that b is attained."""
    return partial(sharp_lipschitz, **{"eps": 1e-3, "horizon": 0.02, **options})  # type: ignore


CLAIM = Claim(
    id="approximation/a-priori",
    title="Theorem A with constants: distance proportional to ε",
    statement=(
        r"\|Y-X\|\le\varepsilon b\,\frac{e^{at}-1}{a},\quad a=\lambda+\frac{\mu}{s},\quad "
        r"b=\ell+\frac{\mu}{s-\varepsilon}"
    ),
    hypotheses=("‖F‖ <= μ", "F is ℓ-Lipschitz, one-sided λ", "‖W - X‖ <= ε < s <= σ_r(X), σ_r(Y)"),
    source=Source("ours", "mathematics 4.1, theorem A"),
    sample=sample,
    check=check,
    extremal=(Extremal(short()), Extremal(partial(constant_defect, horizon=2e-3))),
    controls=(
        Control("0.9 of b", partial(check, lipschitz=0.9, defect=0.9), short()),
        Control(
            "no defect of X: b = ℓ, on prescribed paths",
            partial(check, defect=0.0),
            partial(sample, families=("prescribed path",)),
        ),
    ),
    loose={"curvature": 0},
    trials=18,
    float32="float64 only: the comparison needs e >> rounding, and says nothing about float32",
)
