"""Is every constant of a claim looked at? Scale each by 0.9, one at a time.

The constants of a claim are the keyword arguments of its check that have a number as default (or a
mapping to numbers: one constant for each key). A check that takes a constant from elsewhere cannot
be mutated, so a claim's check takes all of its constants that way.

A constant scaled by 0.9 must be rejected on some sample: of the claim, of its extremal examples, or
of its controls. If it is not, the claim must declare it loose, with the measured factor below which
some sample rejects it; that too is checked.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .core import Claim, Evidence, Sample
from .runner import Settings, evidence

SCALE = 0.9
#: Samples of the claim itself, and at each extremal example and control.
TRIALS, OTHERS = 24, 3


@dataclass(frozen=True)
class Mutation:
    """What became of one scaled constant.

    Attributes
    ----------
    value : float
        The constant as claimed.
    rejected_by : str
        Which sample rejected 0.9 of it; empty if none did.
    loose : float or None
        Declared factor; None if the constant is not declared loose.
    declaration_holds : bool
        Below its declared factor a loose constant is rejected (factor 0: accepted even as 0).
    """

    id: str
    constant: str
    value: float
    rejected_by: str
    loose: float | None
    declaration_holds: bool
    error: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Rejected, or loose as declared."""
        return not self.error and (bool(self.rejected_by) or self.declaration_holds)


def constants(claim: Claim) -> dict[str, float]:
    """Names and values of the claim's constants; ``name[key]`` for entries of a mapping."""
    found: dict[str, float] = {}
    for name, parameter in inspect.signature(claim.check).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        value = parameter.default
        if isinstance(value, float) and value:  # an integer is a choice, such as that of a norm
            found[name] = value
        elif isinstance(value, Mapping):
            found |= {f"{name}[{_key(k)}]": float(x) for k, x in value.items() if _is_number(x)}
    return found


def _is_number(x: Any) -> bool:
    # 0 cannot be scaled; a bool or a string is a choice, not a constant.
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x != 0


def _key(key: Any) -> str:
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def mutated(claim: Claim, constant: str, scale: float) -> Callable[[Sample], Evidence]:
    """The claim's check with one constant scaled."""
    name, _, rest = constant.partition("[")
    value = inspect.signature(claim.check).parameters[name].default
    if rest:
        value = {k: scale * x if _key(k) == rest[:-1] else x for k, x in value.items()}
        return partial(claim.check, **{name: value})
    return partial(claim.check, **{name: scale * value})


def mutate(claim: Claim, constant: str, settings: Settings) -> Mutation:
    """Scale one constant and see whether any sample notices."""
    start = time.perf_counter()
    by, error = _rejected(claim, mutated(claim, constant, SCALE), settings)
    loose, as_declared = claim.loose.get(constant), False
    if not by and not error and loose is not None:
        # A margin of a tenth on the declared factor: another seed has other samples.
        scale = 0.9 * loose
        lower, error = _rejected(claim, mutated(claim, constant, scale), settings)
        as_declared = bool(lower) == (loose > 0.0)
    return Mutation(
        id=claim.id,
        constant=constant,
        value=constants(claim)[constant],
        rejected_by=by,
        loose=loose,
        declaration_holds=as_declared,
        error=error,
        seconds=time.perf_counter() - start,
    )


def measured_looseness(claim: Claim, constant: str, settings: Settings, steps: int = 7) -> float:
    """Largest factor at which some sample rejects the constant, by bisection; 0 if none does."""
    if not _rejected(claim, mutated(claim, constant, 0.0), settings)[0]:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = 0.5 * (low + high)
        rejected = bool(_rejected(claim, mutated(claim, constant, middle), settings)[0])
        low, high = (middle, high) if rejected else (low, middle)
    return low


def _rejected(
    claim: Claim, check: Callable[[Sample], Evidence], settings: Settings
) -> tuple[str, str]:
    """Name of the first sample that rejects, or ''; and an error message, or ''."""
    for name, seed, found in _samples(claim, check, settings):
        if isinstance(found, str):
            return "", f"{name}, seed {seed}: {found}"
        if found.hypotheses_met and not found.holds:
            return f"{name}, seed {seed}", ""
    return "", ""


def _samples(
    claim: Claim, check: Callable[[Sample], Evidence], settings: Settings
) -> Iterator[tuple[str, int, Evidence | str]]:
    """All samples, one of each kind in turn, extremal ones first: rejections come early."""
    exact = Settings(settings.seed, None, torch.float64, settings.device)
    others = [
        *((f"extremal {k + 1}", e.sample) for k, e in enumerate(claim.extremal)),
        *((f"control {c.name!r}", c.sample) for c in claim.controls if c.sample is not None),
    ]
    runs = [_named(name, sample, check, exact, OTHERS) for name, sample in others]
    runs.append(_named("sample", claim.sample, check, exact, min(claim.trials, TRIALS)))
    while runs:
        for run in tuple(runs):
            if (found := next(run, None)) is None:
                runs.remove(run)
            else:
                yield found


def _named(
    name: str, sample: Any, check: Callable[[Sample], Evidence], settings: Settings, trials: int
) -> Iterator[tuple[str, int, Evidence | str]]:
    for seed, found in evidence(sample, check, settings.seeds(trials), settings):
        if isinstance(found, str) and name.startswith("control"):
            continue  # a control's sample may be made for the control's own check
        yield name, seed, found
