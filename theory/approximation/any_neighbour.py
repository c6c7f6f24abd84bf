r"""Corollary A4: it is enough that *some* low-rank neighbour exists, however it moves.

**Statement.** Let X(t) ∈ M_r be arbitrary, even discontinuous, with ‖W - X‖ <= ε, σ_r(X) >= s, and
ε < s/2. Start the low-rank flow at Y(0) = X(0). With s_* = min(s - ε, inf σ_r(Y)), a = λ + μ/s_*,
b = ℓ + μ/(s - 2ε),

    ‖Y - Π_r W‖ <= ε [g e^{at} + b (e^{at} - 1)/a],    ‖Y - W‖ <= ε + that,
    g = min(2, sqrt((s - ε)/(s - 2ε))).

**Proof.** X̂ = Π_r W is no farther from W than X is; σ_r(X̂) = σ_r(W) >= s - ε, σ_{r+1}(W) <= ε.
So X̂ fulfils the hypotheses of theorem A with gap s - 2ε, and all that is left is e(0) = ‖X(0) -
X̂(0)‖ <= gε. The 2 is the triangle inequality. For the root let N = W - X̂, normal at X̂, d = ‖X -
X̂‖: by L3.4, ε² >= ‖W - X‖² = ‖N‖² + d² - 2⟨X - X̂, N⟩ >= d² (1 - ‖N‖₂/σ_r(X̂)) >= d² (s - 2ε)/(s
- ε). ∎

The root is an improvement on mathematics 4.1, A4 (which has 2): it tends to 1 with ε. It is sharp
in that limit (W in M_r, X any point at distance ε), and b where the start is forgotten. Source:
mathematics 4.1, A4 (ours).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lrmanifold import linalg

from ..core import Claim, Control, Evidence, Extremal, Sample, Source
from ._evidence import along_paths, below
from .a_priori import growth
from .a_priori import sample as draw
from .extremal import attracted_path
from .flows import GRID, Path, best_factors, integrate, measure, norm
from .problems import Batch, Problem, best

START = 1.0  # factor of g
DEFECT = 1.0
SHARE = 0.5


def sample(
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    wander: float = 0.05,
    later: float | None = None,
    **fixed,
) -> Sample:
    """A problem, and a neighbour X(t) that jumps at every time about the best one.

    `wander` is how far X(0) = Y(0) is from the best point, `later` (the same by default) the
    largest distance at later times.
    """
    at: Problem = draw(seed, dtype, device, **fixed)["problem"]
    random = Batch(seed + 1, device)
    W = at.start[0]
    first = best_factors(W + wander * random.units(*W.shape[-2:]), at.rank)
    return {
        "problem": replace(at, low_rank_start=(first,)),
        "later": wander if later is None else later,
        "seed": seed,
    }


def nearly_low_rank(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """W(0) in M_r up to 10⁻⁸ and X(0) another point: ‖X - Π_r W‖ = ‖X - W‖ = ε."""
    options = {"families": ("prescribed path",), "noise": 1e-8, "horizon": 1e-3}
    return sample(seed, dtype, device, wander=0.01, later=0.005, **options)


def drawn_to_a_path(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """The start is forgotten, and e stays at δ/m: b is attained. X is the best point always."""
    at = attracted_path(seed, dtype, device)["problem"]
    first = best_factors(at.start[0], at.rank)
    return {"problem": replace(at, low_rank_start=(first,)), "later": 0.0, "seed": seed}


def jumping(sample: Sample, path: Path) -> Tensor:
    """X(t): Y(0) at first, then at every time the rank-r part of W plus a new random matrix."""
    W, at = path.W[0], sample["problem"]
    random = Batch(sample["seed"] + 2, W.device, len(W))
    noise = random.normals(*W.shape[1:])
    noise = noise / torch.linalg.matrix_norm(noise, keepdim=True)
    sizes = random.uniforms(W.shape[1], 1, 1, high=sample["later"])
    X = best(W + sizes * noise, at.rank)
    return torch.cat((path.Y[0][:1], X[1:]))


def check(sample: Sample, *, start: float = START, defect: float = DEFECT) -> Evidence:
    at: Problem = sample["problem"]
    assert at.lipschitz is not None
    assert at.one_sided is not None
    path = integrate(at, 2 * GRID)
    q, X = measure(at, path), jumping(sample, path)
    t = path.times[:, None]
    eps, mu = norm((path.W[0] - X,)).amax(0), q["mu"].amax(0)
    s = linalg.svdvals(X)[..., at.rank - 1].amin(0)
    met = below(eps, SHARE * s)
    s_star = torch.minimum(s - eps, q["s_Y"].amin(0))
    gap = (s - 2.0 * eps).clamp_min(1e-12)
    a, b = at.one_sided + mu / s_star, at.lipschitz + defect * mu / gap
    g = start * ((s - eps) / gap).sqrt().clamp_max(2.0)
    bound = eps * (g * (a * t).exp() + b * growth(a, t))
    detail: dict = {"problem": at.name}
    if bool(met.any()):
        detail["g, mean"] = float(g[met].mean())
        detail["e(0) / (g ε), largest"] = float(
            (q["e"][0] / (eps * g).clamp_min(1e-300))[met].max()
        )
        detail["‖Y-W‖ / bound, largest"] = float((q["distance"] / (eps + bound))[:, met].max())
    return along_paths(q["e"], bound, met, reason="ε >= s/2", detail=detail)


CLAIM = Claim(
    id="approximation/any-neighbour",
    title="A4: any low-rank neighbour will do, even one that jumps",
    statement=(
        r"\|Y-\Pi_rW\|\le\varepsilon\Big[g\,e^{at}+b\,\frac{e^{at}-1}{a}\Big],\quad "
        r"g=\min\Big(2,\sqrt{\tfrac{s-\varepsilon}{s-2\varepsilon}}\Big)"
    ),
    hypotheses=("X(t) in M_r, ‖W - X‖ <= ε < s/2, σ_r(X) >= s", "Y(0) = X(0)"),
    source=Source("ours", "mathematics 4.1, A4, with g in place of 2"),
    sample=sample,
    check=check,
    extremal=(Extremal(nearly_low_rank), Extremal(drawn_to_a_path)),
    controls=(
        Control("0.9 of g, W(0) of rank r", partial(check, start=0.9 * START), nearly_low_rank),
        Control(
            "as if Y began at the best point: g = 0", partial(check, start=0.0), nearly_low_rank
        ),
    ),
    trials=18,
    float32="float64 only: the comparison needs e >> rounding, and says nothing about float32",
)
