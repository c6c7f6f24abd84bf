"""Adversarial search: an evolution strategy on the random numbers behind a sample.

A sample is a function of the numbers that :class:`theory.sampling.Draw` took from its generator.
They are recorded, moved a little, and played back: uniform numbers by reflected Gaussian steps,
Gaussian matrices by x -> sqrt(1 - s²) x + s N, which keeps their distribution. So the search knows
nothing of what the numbers mean, and stays inside what the sampler can draw. (1 + 1) with the
one-fifth rule: a better sample is kept and the step grows, a worse one is forgotten and it shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .core import Claim, Evidence, not_met
from .runner import Settings, described
from .sampling import Entry, taped

#: Share of the budget for samples to start from.
FIRST = 0.25
STEP, SMALLEST, LARGEST = 0.3, 1e-4, 0.7
GROW, SHRINK = 1.5, 1.5**-0.25


@dataclass(frozen=True)
class Found:
    """The worst sample of a search.

    Attributes
    ----------
    seed : int
        Of the sample that the search started from; the search itself is deterministic.
    ratio, holds : float, bool
    steps : int
        Samples looked at.
    evidence : mapping
    """

    seed: int
    ratio: float
    holds: bool
    steps: int
    evidence: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {"seed": self.seed, "steps": self.steps, **self.evidence}


def search(claim: Claim, settings: Settings) -> Found:
    """Look for a sample with a large ratio, in ``settings.search`` steps."""
    budget = settings.search
    generator = torch.Generator().manual_seed(settings.seed)
    best_seed, best, tape = settings.seeds(1)[0], _outside(), list[Entry]()
    first = max(1, round(FIRST * budget))
    # Other seeds than those of the samples: a search should add to them.
    start = settings.seeds(claim.trials).stop
    for seed in range(start, start + first):
        found, entries = _evaluate(claim, seed, (), settings)
        if _key(found) > _key(best):
            best_seed, best, tape = seed, found, entries
    step = STEP
    for _ in range(budget - first):
        candidate = _moved(tape, step, generator)
        found, entries = _evaluate(claim, best_seed, candidate, settings)
        if _key(found) > _key(best):
            best, tape, step = found, entries, min(step * GROW, LARGEST)
        else:
            step = max(step * SHRINK, SMALLEST)
    ratio = best.ratio if best.hypotheses_met else math.nan
    holds = best.holds or not best.hypotheses_met
    return Found(best_seed, ratio, holds, budget, described(best))


def _outside() -> Evidence:
    return not_met("the claim's code could not compute the sample")


def _key(found: Evidence) -> tuple[bool, bool, float]:
    # NaN inside the hypotheses is a violation: what cannot be compared was not shown.
    return (True, *found.severity) if found.hypotheses_met else (False, False, -math.inf)


def _evaluate(
    claim: Claim, seed: int, given: Sequence[Entry], settings: Settings
) -> tuple[Evidence, list[Entry]]:
    """A moved sample may be one that the claim's code cannot compute: it is outside then.

    One of a seed of its own may not, as anywhere else: an error is no evidence for the claim.
    """
    with taped(given) as tape:
        try:
            found = claim.check(claim.sample(seed, settings.dtype, settings.device))
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}"}
            found = _outside() if given else Evidence(math.nan, math.nan, False, detail=told)
    return found, tape.entries


def _moved(tape: Sequence[Entry], step: float, generator: torch.Generator) -> list[Entry]:
    return [Entry(e.kind, _moved_value(e, step, generator)) for e in tape]


def _moved_value(entry: Entry, step: float, generator: torch.Generator) -> Tensor:
    x = entry.value
    # About half of the numbers stay: most problems have a few directions that matter.
    if float(torch.rand((), dtype=torch.float32, generator=generator)) < 0.5:
        return x
    noise = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    if entry.kind == "normal":
        return math.sqrt(1.0 - step * step) * x + step * noise
    y = (x + step * noise).remainder(2.0)
    return torch.where(y < 1.0, y, 2.0 - y).clamp_max(1.0 - 1e-7)
