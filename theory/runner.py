"""Run claims and their controls; pure of printing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .catalogue import select
from .core import Claim, Control, Evidence, Sample, largest, smallest
from .statistics import violation_bound

__all__ = [
    "CONTROL_TRIALS", "ControlVerdict", "Settings", "Verdict", "control_trials", "replay", "select",
    "usable", "verify", "verify_control",
]  # fmt: skip

#: Controls are run on fewer samples than claims: one rejection is enough, a few say how often.
CONTROL_TRIALS = 16
#: Samples at each place where a constant is claimed to be attained.
EXTREMAL_TRIALS = 3
_SEEDS = 100_000  # room for the trials of one seed
#: Room for small multiples of a trial's seed, which some claims take, in torch's 64 bits.
LARGEST_SEED = 10**9
LAST_TRIAL = (LARGEST_SEED + 1) * _SEEDS - 1


@dataclass(frozen=True)
class Settings:
    """What a run is made with.

    Attributes
    ----------
    trials : int or None
        Samples a claim; None: what the claim asks for.
    seed : int
        At most `LARGEST_SEED`. Trial k of any claim has the seed ``100000 * seed + k``.
    search : int
        Steps of the adversarial search on top of the samples; 0: none.

    Raises
    ------
    ValueError
        For numbers out of range.
    """

    seed: int = 0
    trials: int | None = None
    dtype: torch.dtype = torch.float64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    search: int = 0

    def __post_init__(self) -> None:
        if self.trials is not None and self.trials < 1:
            raise ValueError(f"trials must be at least 1, got {self.trials}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"seed must be in 0..{LARGEST_SEED}, got {self.seed}")
        if self.search < 0:
            raise ValueError(f"search must not be negative, got {self.search}")

    def seeds(self, trials: int) -> range:
        start = self.seed * _SEEDS
        return range(start, start + (trials if self.trials is None else self.trials))


def usable(device: torch.device | str, dtype: torch.dtype) -> torch.device:
    """The device, if numbers of this dtype can be computed on it and read.

    Raises
    ------
    ValueError
        If not.
    """
    try:
        torch.ones((), device=device, dtype=dtype).item()  # on "meta" there is nothing to read
    except (RuntimeError, AssertionError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device {device} is not usable: {why}") from error
    return torch.device(device)


@dataclass(frozen=True)
class Verdict:
    """What the samples of one claim said.

    Attributes
    ----------
    met, skipped : int
        Samples inside and outside of the hypotheses.
    independent : int
        Independent problems in the met samples.
    ratio : (min, mean, max)
        NaN if nothing was met.
    violations : int
        Independent problems in the met samples on which the claim does not hold: at most as many
        of them violate it.
    attained : float
        Smallest of the largest ratios at the claim's extremal examples; NaN if it names none.
    searched : float
        Largest ratio that the search found; NaN without a search.
    worst : mapping
        Seed, numbers and details of the sample with the largest ratio: see :func:`replay`.
    failures : tuple of str
        One line for each sample on which the claim does not hold.
    """

    id: str
    title: str
    tag: str
    kind: str
    met: int
    skipped: int
    independent: int
    ratio: tuple[float, float, float]
    failures: tuple[str, ...]
    seconds: float
    violations: int = 0
    attained: float = math.nan
    searched: float = math.nan
    worst: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """At least one sample met the hypotheses, and none of those contradicts the claim."""
        return self.met > 0 and not self.failures

    @property
    def violation_bound(self) -> float:
        """95 % bound on the rate of violations among such problems (Clopper and Pearson)."""
        return violation_bound(self.violations, self.independent)

    def __str__(self) -> str:
        from .report import claims_table, failures

        return "\n".join([claims_table([self]), *failures([self])])


@dataclass(frozen=True)
class ControlVerdict:
    """How often the check rejected a deliberately wrong version of the claim."""

    id: str
    name: str
    met: int
    skipped: int
    rejected: int
    errors: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Rejected on at least one sample; an exception is no rejection."""
        return self.rejected > 0 and not self.errors


Sampler = Callable[[int, torch.dtype, torch.device], Sample]


def evidence(
    sample: Sampler,
    check: Callable[[Sample], Evidence],
    seeds: Sequence[int],
    settings: Settings,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Evidence | str]]:
    """(seed, evidence) of each sample, or (seed, message) if the claim's own code broke."""
    for seed in seeds:
        found: Evidence | str
        try:
            found = check(sample(seed, settings.dtype, settings.device))
        except Exception as error:  # a claim that cannot be computed is not verified
            found = f"{type(error).__name__}: {error}".splitlines()[0]
        yield seed, found
        on_step()


def _nothing() -> None:
    pass


def verify(claim: Claim, settings: Settings, *, on_step: Callable[[], None] = _nothing) -> Verdict:
    """Check one claim on all its samples, on its extremal examples, and by search if asked to."""
    start = time.perf_counter()
    ratios: list[float] = []
    failures: list[str] = []
    worst: dict[str, Any] = {}
    worst_rank = (False, -math.inf)
    met = skipped = independent = violations = 0
    seeds = settings.seeds(claim.trials)
    for seed, found in evidence(claim.sample, claim.check, seeds, settings, on_step):
        if isinstance(found, str):
            failures.append(f"seed {seed}: {found}")
            continue
        if not found.hypotheses_met:
            skipped += 1
            continue
        met += 1
        independent += found.independent
        ratios.extend(found.ratios or (found.ratio,))
        if not found.holds:
            violations += found.independent
            failures.append(f"seed {seed}: measured {found.measured:.6g}, bound {found.bound:.6g}")
        if not worst or found.severity > worst_rank:
            worst_rank, worst = found.severity, {"seed": seed, **described(found)}
    attained, missed = _attained(claim, settings)
    failures += missed
    searched = math.nan
    if settings.search and met:
        from .search import search

        found_by_search = search(claim, settings)
        searched = found_by_search.ratio
        if not found_by_search.holds:
            why = found_by_search.evidence["detail"].get("error", f"ratio {searched:.6g}")
            failures.append(f"search from seed {found_by_search.seed}: {why}")
        worst["search"] = found_by_search.as_dict()
    spread = (
        (smallest(ratios), math.fsum(ratios) / len(ratios), largest(ratios))
        if ratios
        else (math.nan,) * 3
    )
    return Verdict(
        id=claim.id,
        title=claim.title,
        tag=claim.source.tag,
        kind=claim.kind,
        met=met,
        skipped=skipped,
        independent=independent,
        ratio=spread,
        failures=tuple(failures),
        seconds=time.perf_counter() - start,
        violations=violations,
        attained=attained,
        searched=searched,
        worst=worst,
    )


def described(found: Evidence) -> dict[str, Any]:
    """The numbers of one sample, for a report."""
    return {
        "ratio": found.ratio,
        "measured": found.measured,
        "bound": found.bound,
        "holds": found.holds,
        "hypotheses_met": found.hypotheses_met,
        "independent": found.independent,
        "detail": dict(found.detail),
    }


def replay(claim: Claim, seed: int, settings: Settings) -> dict[str, Any]:
    """What the claim's check says about the one sample of that seed."""
    found = claim.check(claim.sample(seed, settings.dtype, settings.device))
    return {"id": claim.id, "seed": seed, **described(found)}


def _attained(claim: Claim, settings: Settings) -> tuple[float, list[str]]:
    """Smallest over the extremal examples of the largest ratio there; what went wrong, in lines."""
    least, failures = math.nan, []
    # Constants are attained in exact arithmetic: float64, whatever the run is in.
    exact = Settings(settings.seed, EXTREMAL_TRIALS, torch.float64, settings.device)
    for k, extremal in enumerate(claim.extremal):
        name, top = f"extremal example {k + 1}", -math.inf
        for seed, found in evidence(extremal.sample, claim.check, exact.seeds(3), exact):
            if isinstance(found, str):
                failures.append(f"{name}, seed {seed}: {found}")
            elif not found.hypotheses_met:
                failures.append(f"{name}, seed {seed}: outside of the hypotheses")
            elif not found.holds:
                failures.append(f"{name}, seed {seed}: ratio {found.ratio:.6g}, does not hold")
            else:
                top = max(top, found.ratio)  # not NaN: it holds
        if top < extremal.least:
            failures.append(
                f"{name}: the largest ratio must be at least {extremal.least:g}, got "
                f"{top:.4g}: a constant is too large"
            )
        least = top if math.isnan(least) else min(least, top)
    return least, failures


def verify_control(
    claim: Claim, control: Control, settings: Settings, *, on_step: Callable[[], None] = _nothing
) -> ControlVerdict:
    """Let the claim's check judge a wrong version of it."""
    start = time.perf_counter()
    met = skipped = rejected = 0
    errors: list[str] = []
    seeds = settings.seeds(control_trials(claim))
    sample = control.sample or claim.sample
    for seed, found in evidence(sample, control.check, seeds, settings, on_step):
        if isinstance(found, str):
            errors.append(f"seed {seed}: {found}")
        elif not found.hypotheses_met:
            skipped += 1
        else:
            met += 1
            rejected += not found.holds
    return ControlVerdict(
        id=claim.id,
        name=control.name,
        met=met,
        skipped=skipped,
        rejected=rejected,
        errors=tuple(errors),
        seconds=time.perf_counter() - start,
    )


def control_trials(claim: Claim) -> int:
    """Samples on which a control is run."""
    return min(claim.trials, CONTROL_TRIALS)
