r"""T2: prox-regularity of several layers together, each with its own bound.

**Statement.** On K = ΠK_{τ_i} with the product metric, for X, Y in K and N normal to K at Y,

    ⟨X - Y, N⟩ <= max_i (c_i ‖N_i‖/σ_r(Y_i)) ‖X - Y‖²,    c_i = ½ sqrt(1 + q_i),

c_i the sharp constant of L4.3 for τ_i and the rank of layer i (½ without a bound). So theorems B, C
and D hold for networks with the *largest* of the layers' curvatures, not with their sum.

**Proof.** L4.3 layer by layer gives Σ_i b_i x_i², x_i = ‖X_i - Y_i‖, and Σ b_i x_i² <= max b_i Σ
x_i². ∎

**Sharp**: the layer with the largest b_i at L4.3's extremal example, and X = Y in the others. The
sum in place of the max is strictly looser as soon as two layers have a normal force (control).
Ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ..conditioning import k_tau_prox
from ..core import Claim, Control, Evidence, Extremal, Sample, Source, inequality, largest, smallest
from ..sampling import Draw, eps

FACTOR = 1.0  # of the sharp c_i
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Two or three layers of different sizes, ranks and bounds; normal forces of different size."""
    draw = Draw(seed, dtype, device)
    layers = []
    for k in range(draw.integer(2, 3)):
        layer = dict(k_tau_prox.sample(7919 * seed + k, dtype, device, **fixed))
        layer["size"] = draw.log_uniform(0.1, 10.0)
        layers.append(layer)
    return {"layers": layers}


def one_layer(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """The extremal example in one of two layers; the other rests, with a smaller curvature."""
    layers = [dict(k_tau_prox.attained(2 * seed + k, dtype, device)) for k in range(2)]
    b = [constant(x) / x["sigma"] for x in layers]
    layers[1]["size"], layers[0]["size"] = 1.0, 0.5 * b[1] / b[0]
    layers[0]["D"] = 0.0 * layers[0]["D"]
    return {"layers": layers}


def constant(layer: Sample) -> float:
    """c of one layer."""
    if not layer["active"]:
        return 0.5
    return k_tau_prox.constant(1.0 + layer["tau"], layer["r"])


def check(
    sample: Sample,
    *,
    factor: float = FACTOR,
    together: Callable[[Iterable[float]], float] = largest,
) -> Evidence:
    layers = sample["layers"]
    measured = sum(float((x["D"] * x["N"]).sum()) * x["size"] for x in layers)
    squared = sum(float(x["D"].square().sum()) for x in layers)
    curvatures = [factor * constant(x) * x["size"] / x["sigma"] for x in layers]
    bound = together(curvatures) * squared
    D: Tensor = layers[0]["D"]
    size = sum(float(x["D"].norm()) * x["size"] for x in layers)
    tolerance = ROUNDING * eps(D) * (size + bound)
    detail = {"curvatures": curvatures, "max / sum": largest(curvatures) / sum(curvatures)}
    return inequality(largest((measured, 0.0)), bound, tolerance=tolerance, detail=detail)


def check_sum_is_as_good(sample: Sample) -> Evidence:
    """That the sum of the curvatures is no larger than the largest."""
    layers = sample["layers"]
    curvatures = [constant(x) * x["size"] / x["sigma"] for x in layers]
    return inequality(sum(curvatures), largest(curvatures), tolerance=1e-12)


CLAIM = Claim(
    id="training/product",
    title="T2: several layers bend like the one that bends most",
    statement=(
        r"\langle X-Y,N\rangle\le\max_i\frac{c_i\|N_i\|}{\sigma_r(Y_i)}\,\|X-Y\|^2,\quad "
        r"c_i=\tfrac12\sqrt{1+\tfrac{\kappa_i^2(r_i-1)}{\kappa_i^2(r_i-1)+1}}"
    ),
    hypotheses=("X, Y in ΠK_{τ_i}", "N_i in the proximal normal cone at Y_i", "product metric"),
    source=Source("ours", "theory/training/product.py; mathematics 9"),
    sample=sample,
    check=check,
    extremal=(Extremal(one_layer),),
    controls=(
        Control("0.9 of c in one layer of two", partial(check, factor=0.9), one_layer),
        Control("the smallest curvature", partial(check, together=smallest), one_layer),
        Control("the sum claimed to be as good as the max", check_sum_is_as_good, one_layer),
    ),
    trials=200,
    float32="64 eps (Σ‖X_i - Y_i‖‖N_i‖ + bound)",
)
