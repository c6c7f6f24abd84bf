r"""The error is proportional to ε: halving what is not low-rank halves the price of low rank.

**Statement.** On a family of problems that differ only in the size of what is not low-rank,
theorem A bounds sup ‖Y - X‖ by a constant times ε. Measured: the slope of log sup‖Y - X‖ against
log sup ε is 1, neither ½ (all that theorem B gives) nor 2.

**Samples.** Paths A(t) = low-rank(t) + noise, prescribed (F = Ȧ) or attracting (F = Ȧ - weights∘(W
- A)), with the noise halved six times and everything else kept. mathematics 4.1 (ours).
"""

from __future__ import annotations

import math
from functools import partial

import torch

from ..core import Claim, Control, Evidence, Sample, Source, inequality
from ..plotting import slope
from .a_priori import growth
from .flows import GRID, integrate, measure
from .problems import problem

ORDER = 1.0
TOLERANCE = 0.1
LEVELS = 7


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    options = {"families": ("prescribed path",), "restoring": float(seed % 2), **fixed}
    levels = [0.05 * 0.5**k for k in range(LEVELS)]
    return {"problems": [problem(seed, device, **{**options, "noise": x}) for x in levels]}


def errors(sample: Sample) -> list[dict[str, float]]:
    """Root mean squares over the batch of sup ε, sup e and the a-priori bound, for every level."""
    rows = []
    for at in sample["problems"]:
        path = integrate(at, 2 * GRID)
        q = measure(at, path)
        s, eps, mu = torch.minimum(q["s_X"], q["s_Y"]).amin(0), q["eps"].amax(0), q["mu"].amax(0)
        bound = eps * (at.lipschitz + mu / (s - eps)) * growth(mu / s, path.times[-1])
        values = {"ε": eps, "e": q["e"].amax(0), "bound": bound}
        rows.append({k: math.sqrt(float(v.square().mean())) for k, v in values.items()})
    return rows


def check(sample: Sample, *, order: float = ORDER) -> Evidence:
    rows = errors(sample)
    fitted = slope([r["ε"] for r in rows], [r["e"] for r in rows])
    detail = {"slope": fitted, "e / ε": rows[-1]["e"] / rows[-1]["ε"]}
    return inequality(abs(fitted - order), TOLERANCE, detail=detail)


def figure(dtype: torch.dtype, device: torch.device):
    """sup ‖Y - X‖ against ε, with the bound, on a prescribed and on an attracting path."""
    from ..plotting import COLOURS, MARKERS, new

    fig, ax = new(width=6.2)
    for k, (seed, name) in enumerate(((2, "prescribed path"), (3, "attracting path"))):
        rows = errors(sample(seed, dtype, device, m=10, n=8, rank=3, spread=2.0, change=0.5))
        x, e, bound = ([r[key] for r in rows] for key in ("ε", "e", "bound"))
        label = f"{name}: slope {slope(x, e):.2f}"
        ax.loglog(x, e, MARKERS[k] + "-", color=COLOURS[k + 1], label=label)
        ax.loglog(x, bound, "--", color=COLOURS[k + 1], label="theorem A, a-priori")
    ax.set(xlabel="ε = sup ‖W - X‖: what is not low-rank", ylabel="sup ‖Y - X‖, Frobenius norm")
    ax.set(title="The price of low rank is proportional to ε (10 x 8, rank 3)")
    ax.legend(loc="upper left")
    return fig


CLAIM = Claim(
    id="approximation/proportional",
    title="The error is proportional to ε",
    statement=r"\sup_t\|Y-X\|\sim\varepsilon^{1}",
    hypotheses=("those of theorem A", "problems that differ in ε only"),
    source=Source("ours", "mathematics 4.1"),
    sample=sample,
    check=check,
    controls=(
        Control("order ½", partial(check, order=0.5)),
        Control("order 2", partial(check, order=2.0)),
    ),
    trials=8,
    figure=figure,
    float32="float64 only: errors down to 10⁻⁴ of ‖W‖ are compared",
    kind="order",
)
