"""Run claims and their controls; pure of printing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from .core import Claim, Control, Evidence, Sample

#: Controls are run on fewer samples than claims: one rejection is enough, a few say how often.
CONTROL_TRIALS = 16
_SEEDS = 100_000  # room for the trials of one seed


@dataclass(frozen=True)
class Settings:
    """What a run is made with.

    Attributes
    ----------
    trials : int or None
        Samples a claim; None: what the claim asks for.
    seed : int
        Trial k of any claim has the seed ``100000 * seed + k``.
    """

    seed: int = 0
    trials: int | None = None
    dtype: torch.dtype = torch.float64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def seeds(self, trials: int) -> range:
        start = self.seed * _SEEDS
        return range(start, start + (trials if self.trials is None else self.trials))


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

    @property
    def passed(self) -> bool:
        """At least one sample met the hypotheses, and none of those contradicts the claim."""
        return self.met > 0 and not self.failures


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


def select(claims: Iterable[Claim], pattern: str | None) -> list[Claim]:
    """Claims whose id matches a glob pattern (``geometry/*``), or has it as its last part."""
    if pattern is None:
        return list(claims)
    return [c for c in claims if fnmatchcase(c.id, pattern) or c.id.split("/")[-1] == pattern]


def _evidence(
    sample: Callable[[int, torch.dtype, torch.device], Sample],
    check: Callable[[Sample], Evidence],
    seeds: Sequence[int],
    settings: Settings,
    on_step: Callable[[], None],
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
    """Check one claim on all its samples."""
    start = time.perf_counter()
    ratios: list[float] = []
    failures: list[str] = []
    met = skipped = independent = 0
    seeds = settings.seeds(claim.trials)
    for seed, found in _evidence(claim.sample, claim.check, seeds, settings, on_step):
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
            failures.append(f"seed {seed}: measured {found.measured:.6g}, bound {found.bound:.6g}")
    spread = (
        (min(ratios), math.fsum(ratios) / len(ratios), max(ratios)) if ratios else (math.nan,) * 3
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
    )


def verify_control(
    claim: Claim, control: Control, settings: Settings, *, on_step: Callable[[], None] = _nothing
) -> ControlVerdict:
    """Let the claim's check judge a wrong version of it."""
    start = time.perf_counter()
    met = skipped = rejected = 0
    errors: list[str] = []
    seeds = settings.seeds(control_trials(claim))
    sample = control.sample or claim.sample
    for seed, found in _evidence(sample, control.check, seeds, settings, on_step):
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
    return min(claim.trials, CONTROL_TRIALS)
