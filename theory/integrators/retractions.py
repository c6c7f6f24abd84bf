r"""The library's retractions *are* these integrators, for a constant force.

**Statement.** For a tangent vector ξ at W and F = ξ constant, one step of size t of KSL,
Strang-KSL, BUG, augmented BUG and parallel BUG from W gives the point that
``lrmanifold.retractions`` computes for tξ, by thin products and without substeps. Truncated SVD of
W + tξ is one step of projected Euler.

**Proof.** The substeps of a constant force are its increments: K = US + tξV, and so on. ∎

So what is known of an integrator (order, robustness to small σ_r, exactness) holds for the
retraction of the same name, and the plain schemes here are an independent implementation to test
it against. mathematics 2 and 7 (classical).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import lrmanifold as lrm

from ..core import Claim, Control, Evidence, Sample, Source, identity, largest
from ..sampling import Draw, eps
from .schemes import SCHEMES, dense

PAIRS = {
    "ksl": "KSL",
    "strang": "Strang-KSL",
    "bug": "BUG",
    "augmented_bug": "augmented BUG",
    "parallel_bug": "parallel BUG",
    "svd": "projected Euler + SVD",
}
ROUNDING = 64.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(3, 9)
    manifold = lrm.FixedRank(m, n, r)
    X = manifold.pack(*draw.give_point(draw.point(m, n, r, draw.cond(1.0, 1e2))))
    Z = draw.give(draw.normal(m, n))
    return {
        "manifold": manifold,
        "X": X,
        "Z": Z,
        "t": draw.fixed.get("t", draw.log_uniform(1e-3, 1.0)),
    }


def check(sample: Sample, *, pairs: dict[str, str] = PAIRS) -> Evidence:
    M, X, t = sample["manifold"], sample["X"], sample["t"]
    xi = M.project_ambient(X, sample["Z"])
    Z = M.tangent_to_dense(X, xi)
    size = float(M.to_dense(X).norm() + t * Z.norm())
    core = M.unpack(X).S + t * M.unpack(xi).S
    # The bases of K and L are determined up to rounding over their smallest singular value.
    smallest = float(torch.linalg.svdvals(core)[-1])
    unit = eps(X) * size * largest((1.0, size / smallest))

    def force(s: float, Y: Tensor) -> Tensor:
        return Z

    deviations = {}
    for name, scheme in pairs.items():
        ours: Callable[..., Tensor] = lrm.retractions.get(name)
        Y = SCHEMES[scheme](force, 0.0, t, M.unpack(X))
        deviations[name] = float((M.to_dense(ours(M, X, t * xi)) - dense(Y)).norm())
    detail = {name: d / unit for name, d in deviations.items()}
    return identity(largest(deviations.values()), tolerance=ROUNDING * unit, detail=detail)


# A step so long, and of rank 3, that different schemes differ visibly in float32 too.
LARGE = partial(sample, m=7, n=6, r=3, cond=2.0, t=1.0)

CLAIM = Claim(
    id="integrators/retractions",
    title="Each low-rank retraction is one step of its integrator",
    statement=(
        r"R_W(t\xi)=\Phi_t^{F\equiv\xi}(W)\quad"
        r"\text{for KSL, Strang, BUG, augmented, parallel, SVD}"
    ),
    hypotheses=("F = ξ constant, tangent at W",),
    source=Source("classical", "mathematics 2 and 7"),
    sample=sample,
    check=check,
    controls=(
        Control("ksl against BUG", partial(check, pairs={"ksl": "BUG"}), LARGE),
        Control(
            "factored (polar) against the factor ODE with QR",
            partial(check, pairs={"factored": "factor ODE, Euler + QR"}),
            LARGE,
        ),
    ),
    trials=60,
    float32="64 eps (‖W‖ + t‖ξ‖) max(1, that / σ_r(S + tM)): bases of K and L lose the latter",
    kind="identity",
)
