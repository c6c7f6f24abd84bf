"""Is a difference more than the seeds' spread: paired tests, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .groups import ATTACKS, Group


@dataclass(frozen=True)
class Comparison:
    """One rival against the chosen method; differences in points, positive for the chosen."""

    rival: str
    column: str
    difference: float
    wins: int
    seeds: int
    p_t: float | None
    p_sign: float

    @property
    def decided(self) -> str:
        """In a word; a t-test at 5 %, never from fewer than three seeds, each one by itself."""
        if self.seeds < 3 or self.p_t is None or self.p_t > 0.05:
            return "undecided"
        return "better" if self.difference > 0 else "worse"


def columns(group: Group) -> list[tuple[str, tuple[str, ...]]]:
    """Name and path of every accuracy column that a group has."""
    found: list[tuple[str, tuple[str, ...]]] = [("clean", ("clean", "accuracy"))]
    for attack, title in ATTACKS.items():
        found += [(f"{title} {eps}", (attack, eps)) for eps in group.head.get(attack, {})]
    return found


def compare(chosen: Group, rivals: Sequence[Group]) -> list[Comparison]:
    """Every rival in every column, over the seeds that both have (two or more)."""
    found = []
    for rival in rivals:
        for name, path in columns(chosen):
            ours, theirs = chosen.by_seed(*path), rival.by_seed(*path)
            seeds = sorted(set(ours) & set(theirs))
            if len(seeds) > 1:
                d = 100 * np.array([ours[s] - theirs[s] for s in seeds])
                found.append(_paired(rival.label, name, d))
    return found


def _paired(rival: str, column: str, d: np.ndarray) -> Comparison:
    from scipy import stats

    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    p_sign = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    p_t = float(stats.ttest_1samp(d, 0.0).pvalue) if d.std() > 0 else None
    if p_t is not None and not math.isfinite(p_t):
        p_t = None
    return Comparison(rival, column, float(d.mean()), wins, len(d), p_t, p_sign)
