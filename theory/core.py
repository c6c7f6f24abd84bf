"""What a claim is, and what counts as evidence for it.

A claim is a statement with hypotheses, constants and a source, a generator of samples, and a check.
The check is the whole of the claim: it takes every constant from the claim's own file, so that
changing one there makes it fail. Each claim carries controls, deliberately wrong versions that the
same check must reject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, SupportsFloat, TypeVar

import torch

Tag = Literal["published", "classical", "ours"]
Kind = Literal["inequality", "identity", "order"]
Sample = Mapping[str, Any]
K = TypeVar("K")


@dataclass(frozen=True)
class Source:
    """Where a statement comes from.

    Attributes
    ----------
    tag : {"published", "classical", "ours"}
        A theorem of a paper; textbook knowledge; derived and proved in the project's mathematics.
    reference : str
        Paper with equation or theorem number, or the section of the mathematics.
    """

    tag: Tag
    reference: str


@dataclass(frozen=True)
class Evidence:
    """What one sample says about a claim.

    Attributes
    ----------
    measured, bound : float
        For an inequality ``measured <= bound``, at the place of the largest ratio. For an identity,
        the largest deviation and its tolerance. For an order of convergence, the deviation of the
        fitted slope from the claimed one and what is allowed.
    holds : bool
        Whether the claim holds on this sample, tolerance included. Inside the hypotheses it is
        False if `measured`, `bound`, `ratio` or one of `ratios` is NaN, whatever the check says:
        so too if both sides are infinite.
    hypotheses_met : bool
        False: the sample is outside the claim. It is skipped and counted, never passed.
    independent : int
        Number of independent problems in the sample, each of which is judged: points of one
        trajectory count once, and so does a batch of which only a mean or a slope is judged.
    detail : dict
        Further numbers for pictures and reports.
    ratios : sequence of float
        Where one sample makes many comparisons, all their ratios, so that the report's min and
        mean are not taken over maxima. Empty: the one ratio.
    """

    measured: float
    bound: float
    holds: bool
    hypotheses_met: bool = True
    independent: int = 1
    detail: Mapping[str, Any] = field(default_factory=dict)
    ratios: Sequence[float] = ()

    def __post_init__(self) -> None:
        numbers = (self.measured, self.bound, self.ratio, *self.ratios)
        if self.hypotheses_met and any(map(math.isnan, numbers)):
            object.__setattr__(self, "holds", False)

    @property
    def ratio(self) -> float:
        """``measured / bound``; 0 if both vanish, NaN outside the hypotheses and for Inf / Inf."""
        if not self.hypotheses_met:
            return math.nan
        if self.bound == 0.0:
            return 0.0 if self.measured == 0.0 else math.inf
        return self.measured / self.bound

    @property
    def severity(self) -> tuple[bool, float]:
        """Order of samples, the worst last: a violation is worse than any ratio, NaN than that."""
        # Tolerances differ from sample to sample, so the ratio alone does not order violations.
        return not self.holds, math.inf if math.isnan(self.ratio) else self.ratio


def inequality(
    measured: SupportsFloat, bound: SupportsFloat, *, tolerance: float = 0.0, **more: Any
) -> Evidence:
    """Evidence for ``measured <= bound`` up to an absolute rounding `tolerance`."""
    measured, bound = float(measured), float(bound)
    return Evidence(measured, bound, bool(measured <= bound + tolerance), **more)


def largest(values: Iterable[SupportsFloat]) -> float:
    """The largest value, NaN if one is NaN: Python's ``max`` drops a NaN that is not the first."""
    numbers = [float(x) for x in values]
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def smallest(values: Iterable[SupportsFloat]) -> float:
    """The smallest value, NaN if one is NaN."""
    return -largest(-float(x) for x in values)


def worst_of(defects: Mapping[K, SupportsFloat]) -> tuple[K, float]:
    """Name and size of the largest defect; NaN is larger than any number."""
    sizes = {key: float(x) for key, x in defects.items()}
    worst = max(sizes, key=lambda key: (math.isnan(sizes[key]), sizes[key]))
    return worst, sizes[worst]


def violated(defects: Mapping[K, SupportsFloat], tolerance: float) -> Evidence | None:
    """Evidence against the claim from its largest defect; None if all are within the tolerance."""
    what, size = worst_of(defects)
    # `size > tolerance` would be false for NaN.
    return None if size <= tolerance else inequality(size, tolerance, detail={"what": what})


def severest(*found: Evidence) -> Evidence:
    """Of several inequalities of one claim, the one that is violated, or nearest to it."""
    return max(found, key=lambda evidence: evidence.severity)


def identity(deviation: float, *, tolerance: float, **more: Any) -> Evidence:
    """Evidence for an identity: the deviation must not exceed a tolerance derived from roundoff."""
    return inequality(deviation, tolerance, **more)


def not_met(reason: str) -> Evidence:
    """A sample outside the hypotheses."""
    return Evidence(math.nan, math.nan, False, hypotheses_met=False, detail={"reason": reason})


@dataclass(frozen=True)
class Control:
    """A wrong version of the claim that the check must reject.

    Attributes
    ----------
    name : str
        What is wrong, e.g. "0.9 of the constant".
    check : callable
        Sample -> Evidence, the claim's own check with the wrong constant, formula or hypothesis.
    sample : callable, optional
        Its own samples, e.g. the extremal example at which a sharp constant is attained.
    """

    name: str
    check: Callable[[Sample], Evidence]
    sample: Callable[[int, torch.dtype, torch.device], Sample] | None = None


@dataclass(frozen=True)
class Extremal:
    """Samples at which a constant of the claim is attained.

    The *unmodified* claim is checked there too: it must hold, with a ratio of at least `least`. So
    a constant that is too large is found, not only one that is too small.

    Attributes
    ----------
    sample : callable
        (seed, dtype, device) -> mapping, as ``Claim.sample``.
    least : float
        Smallest ratio measured / bound that these samples must reach.
    """

    sample: Callable[[int, torch.dtype, torch.device], Sample]
    least: float = 0.99


@dataclass(frozen=True)
class Claim:
    """One statement that could be wrong.

    Attributes
    ----------
    id : str
        ``group/name``, e.g. "geometry/sin-theta".
    title : str
    statement : str
        In LaTeX, with all constants.
    hypotheses : tuple of str
    source : Source
    sample : callable
        (seed, dtype, device) -> mapping; the same seed gives the same sample.
    check : callable
        Sample -> Evidence.
    controls : tuple of Control
    trials : int
        Samples in a default run.
    figure : callable, optional
        (dtype, device) -> matplotlib Figure, where looking says more than reading.
    float32 : str
        How the tolerance in float32 follows from the unit roundoff and the problem's condition, or
        why the claim is checked in float64 only (then the sample ignores the dtype asked for).
    extremal : tuple of Extremal
        Where constants are sharp. Empty: no sharp constant is claimed.
    loose : mapping from a constant's name to float
        Constants of the check (its keyword arguments with a number as default) that are not sharp,
        with the measured factor: scaled by less than that, the check rejects the claim on some
        sample. 0: no sample depends on it. ``python -m theory --mutate`` accepts these, and no
        others.
    kind : {"inequality", "identity", "order"}
        What a ratio means: measured / bound; deviation / rounding tolerance; deviation of a fitted
        slope / what is allowed. Only the first says how tight a statement is.
    """

    id: str
    title: str
    statement: str
    hypotheses: tuple[str, ...]
    source: Source
    sample: Callable[[int, torch.dtype, torch.device], Sample]
    check: Callable[[Sample], Evidence]
    controls: tuple[Control, ...]
    trials: int = 40
    figure: Callable[[torch.dtype, torch.device], Any] | None = None
    float32: str = ""
    kind: Kind = "inequality"
    extremal: tuple[Extremal, ...] = ()
    loose: Mapping[str, float] = field(default_factory=dict)
