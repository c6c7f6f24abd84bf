r"""Rigorous enclosures of the closed-form inequalities: every point of a region, not samples of it.

**Statement.** With interval arithmetic on boxes that cover the regions,

  (i) for n = s (1, …, 1, -κ(r-1)), the extremal normal of the prox constant (L4.3), and any a >= 0,
      b = ‖n⁻‖_∞: (a + b)² <= 4c² (a² + ‖n‖²) with c(κ, r) = ½ sqrt(1 + q), q = κ²(r-1)/(κ²(r-1) +
      1), with equality at a = ‖n‖²/b, and ½ <= c <= 1/√2; κ in [1, 100], r = 2, 3, 4, 8, 64, b/a in
      [10⁻³, 10³];
 (ii) for a spectrum (κ, 1) brought to cond <= k = 1 + share (κ - 1), share 0.3 and 0.6, κ in
      [1.5, 100], the derivative f'(t)/2 = Σ (t - σ)₊ - k Σ (σ - kt)₊ of f(t) = Σ dist(σ, [t, kt])²
      is positive at 1.05 t* and negative at t*/1.05, t* = (kκ + 1)/(k² + 1) the closed form (exact
      projection, mathematics 5);
(iii) for r = 2 and κ - 1 in [10⁻², 99], R and α from their definitions: ln κ <= R/(√2 σ_2²), and
      the converse R <= α²√2 (κ² - 1)/(2κ) (penalty, mathematics 5).

**Proof.** An interval operation contains the result at every point of its box and rounds outwards,
so the upper end of left/right bounds the quotient on the whole box. ∎

Both sides are evaluated apart, each as it is stated: a quotient that is simplified first has its
result built in, and holds for a wrong q or t* too (controls).

One sample is one box of κ; 240 of them cover each region, so a default run is a proof, up to the
allowance: where both sides touch, intervals are a little wider than the range, and 1 + 0.03 is
accepted in (i) and (iii); (ii) has none. Other regions (more singular values in (ii) and (iii),
κ > 100) and other normals in (i) are left to sampling. Source: mathematics 5, L4.3 (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..core import Claim, Control, Evidence, Sample, Source, largest, worst_of
from ._enclosure import bounded, box, intervals, positive

CELLS = 240
HALVINGS = 12
SLACK = 0.03
RANKS = (2, 3, 4, 8, 64)
SHARES = (0.3, 0.6)
REACH = 1.0  # factor of c
LOGARITHM = 0.5  # of κ² - 1
THRESHOLD = 1.0  # of the closed form t*


def share_of_normal(kappa: Any, r: int) -> Any:
    """q."""
    return 1 - 1 / (kappa**2 * (r - 1) + 1)


def threshold_of(kappa: Any, k: Any) -> Any:
    """t* of the spectrum (κ, 1): p = q = 1."""
    return (k * kappa + 1) / (k**2 + 1)


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Box number `seed` (modulo their number) of each region."""
    return {"k": seed % CELLS}


def prox(k: int, factor: float, share: Callable[[Any, int], Any]) -> dict[str, float]:
    """Upper ends, all r together: left/right of (i), its inverse at equality, ½/c, and √2 c."""
    iv, limit = intervals(), 1 + SLACK

    def c(kappa: Any, r: int) -> Any:
        return factor * iv.sqrt(1 + share(kappa, r)) / 2

    def squared(kappa: Any, r: int) -> Any:
        """(‖n‖/b)², from n with s = 1."""
        return ((r - 1) + (kappa * (r - 1)) ** 2) / (kappa * (r - 1)) ** 2

    def quotient(kappa: Any, r: int) -> Callable[[Any], Any]:
        """left/right of (i) for a = 1 and b = x."""
        right, n = 4 * c(kappa, r) ** 2, squared(kappa, r)
        return lambda x: (1 + x) ** 2 / (right * (1 + n * x**2))

    def attained(kappa: Any, r: int) -> Any:
        return 1 / quotient(kappa, r)(1 / squared(kappa, r))

    def over_x(kappa: Any, r: int) -> Any:
        return iv.mpf(bounded(quotient(kappa, r), iv.mpf([1e-3, 1e3]), limit, HALVINGS))

    functions: dict[str, Callable[..., Any]] = {
        "prox": over_x,
        "prox, attained": attained,
        "prox, ½/c": lambda kappa, r: 1 / (2 * c(kappa, r)),
        "prox, √2 c": lambda kappa, r: iv.sqrt(2) * c(kappa, r),
    }
    kappas = box(k, CELLS, 1.0, 100.0)
    return {
        name: largest(bounded(partial(f, r=r), kappas, limit, 3) for r in RANKS)
        for name, f in functions.items()
    }


def clip(k: int, factor: float, threshold: Callable[[Any, Any], Any]) -> dict[str, float]:
    """Upper ends of the smaller over the larger part of f', at 1.05 t* and at t*/1.05."""

    def parts(kappa: Any, share: float, times: float) -> tuple[Any, Any]:
        bound = 1 + share * (kappa - 1)
        t = factor * threshold(kappa, bound) * times
        rise = sum(positive(t - s) for s in (kappa, 1))
        return rise, bound * sum(positive(s - bound * t) for s in (kappa, 1))

    def above(kappa: Any, share: float) -> Any:
        rise, fall = parts(kappa, share, 1.05)
        return fall / rise

    def below(kappa: Any, share: float) -> Any:
        rise, fall = parts(kappa, share, 1 / 1.05)
        return rise / fall

    kappas = box(k, CELLS, 1.5, 100.0)
    return {
        name: largest(bounded(partial(f, share=x), kappas, 1.0, HALVINGS) for x in SHARES)
        for name, f in (("clip, f' > 0 above t*", above), ("clip, f' < 0 below t*", below))
    }


def penalty(k: int, logarithm: float) -> dict[str, float]:
    """Upper ends of both quotients for r = 2, σ = (κ, 1)."""
    iv = intervals()

    def regulariser(kappa: Any) -> tuple[Any, Any]:
        """R and α²."""
        mean = (kappa**2 + 1) / 2
        return iv.sqrt(sum((s**2 - mean) ** 2 for s in (kappa, 1))), mean

    def first(u: Any) -> Any:
        R, _ = regulariser(1 + u)
        return iv.log(1 + u) / (2 * logarithm * R / iv.sqrt(2))

    def converse(u: Any) -> Any:
        kappa = 1 + u
        R, mean = regulariser(kappa)
        return R / (mean * iv.sqrt(2) * (kappa**2 - 1) / (2 * kappa))

    region = box(k, CELLS, 1e-2, 99.0)
    return {
        name: bounded(f, region, 1 + SLACK, HALVINGS)
        for name, f in (("penalty", first), ("penalty, converse", converse))
    }


def check(
    sample: Sample,
    *,
    reach: float = REACH,
    logarithm: float = LOGARITHM,
    threshold: float = THRESHOLD,
    share: Callable[[Any, int], Any] = share_of_normal,
    closed_form: Callable[[Any, Any], Any] = threshold_of,
) -> Evidence:
    k = sample["k"]
    touching = {**prox(k, reach, share), **penalty(k, logarithm)}
    apart = clip(k, threshold, closed_form)
    found = {**touching, **apart}
    holds = worst_of(touching)[1] <= 1.0 + SLACK and worst_of(apart)[1] <= 1.0
    return Evidence(worst_of(found)[1], 1.0, holds, True, 1, found)


def unweighted(kappa: Any, k: Any) -> Any:
    """kp + q in place of k²p + q."""
    return (k * kappa + 1) / (k + 1)


CLAIM = Claim(
    id="conditioning/enclosed",
    title="Closed forms enclosed by interval arithmetic",
    statement=(
        r"a+\|n^-\|_\infty\le2c\sqrt{a^2+\|n\|^2};\quad f'(t)=0;\quad "
        r"\ln\kappa\le\frac{R}{\sqrt2\sigma_2^2},\ R\le\alpha^2\sqrt2\,\frac{\kappa^2-1}{2\kappa}"
    ),
    hypotheses=("κ in [1, 100]", "r = 2, 3, 4, 8, 64 (prox), r = 2 (clip, penalty)"),
    source=Source("ours", "mathematics 5 and L4.3; mpmath.iv"),
    sample=sample,
    check=check,
    controls=(
        Control("0.9 of c", partial(check, reach=0.9)),
        Control("0.9 of the penalty's ½", partial(check, logarithm=0.45)),
        Control("q = 0.3", partial(check, share=lambda kappa, r: intervals().mpf(0.3))),
        Control("q = κ", partial(check, share=lambda kappa, r: kappa)),
        Control("kp + q in place of k²p + q", partial(check, closed_form=unweighted)),
    ),
    trials=CELLS,
    float32="intervals of 53 bits, whatever the dtype",
)
