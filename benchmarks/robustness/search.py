"""The search for a family's setting: as many trials for each, ends of the grid never the best.

The grid has no ends of its own: every axis is a geometric ladder that is extended wherever the
search goes, up to the number of trials. It starts at the announced point, two steps above and two
below it in the rate, then from the best so far two steps up and down in each other axis that is
announced. Then the first neighbour of the best point that was not tried yet is tried, axis by axis,
announced ones first, until the trials are used up; where the best point has none left, the
neighbours of the second best follow, and so on. The best point is *interior* if all its neighbours
were tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Point = tuple[int, ...]


@dataclass(frozen=True)
class Axis:
    """A ladder of values, ``start * factor ** k``; with `zero` 0 is its lowest rung, below `first`.

    Attributes
    ----------
    factor : float
    first : float or None
        The smallest value above 0, for axes on which 0 is a value (decay, smoothing).
    below : float
        Values from here on do not exist (label smoothing: 1).
    announced : bool
        Two rungs up and down are tried right after the rate: an axis that is only searched when
        its turn comes may never be.
    """

    factor: float
    first: float | None = None
    below: float = math.inf
    announced: bool = False

    def __post_init__(self) -> None:
        if not self.factor > 1 or not (self.first is None or self.first > 0):
            raise ValueError(
                f"factor must be > 1 and first > 0, got {self.factor!r} and {self.first!r}"
            )

    def value(self, start: float, k: int) -> float | None:
        """The value k rungs above `start`; None where the axis has no more."""
        if self.first is None:
            found = start * self.factor**k
        else:
            rung = self._rung(start) + k
            if rung < 0:
                return None
            found = self.first * self.factor ** (rung - 1) if rung else 0.0
        return float(f"{found:.6g}") if found < self.below else None

    def _rung(self, start: float) -> int:
        if not start or self.first is None:
            return 0
        return 1 + round(math.log(start / self.first) / math.log(self.factor))


@dataclass(frozen=True)
class Ladder:
    """The axes of a family and where its search starts."""

    axes: Mapping[str, Axis]
    start: Mapping[str, float]

    def values(self, point: Point) -> dict[str, float] | None:
        """The setting at a point; None where it does not exist."""
        found = {
            name: axis.value(self.start[name], k)
            for (name, axis), k in zip(self.axes.items(), point, strict=True)
        }
        return None if None in found.values() else found  # type: ignore[return-value]

    def wide(self) -> list[int]:
        """The places of the rate and of the announced axes."""
        return [i for i, axis in enumerate(self.axes.values()) if i == 0 or axis.announced]

    def first(self, scores: Mapping[Point, float]) -> Point | None:
        """The next of the announced points; None if all are among the scores."""
        found = [(0,) * len(self.axes)]
        for i in self.wide():
            if missing := [point for point in found if point not in scores]:
                return missing[0]
            base = ranked({point: scores[point] for point in found})[0]
            beside = [(*base[:i], base[i] + k, *base[i + 1 :]) for k in (2, -2)]
            found += [point for point in beside if self.values(point) is not None]
        return next((point for point in found if point not in scores), None)

    def neighbours(self, point: Point) -> list[Point]:
        """The existing points one rung away, axis by axis."""
        order = [*self.wide(), *(i for i in range(len(point)) if i not in self.wide())]
        found = [(*point[:i], point[i] + k, *point[i + 1 :]) for i in order for k in (1, -1)]
        return [p for p in found if self.values(p) is not None]

    def next(self, scores: Mapping[Point, float]) -> Point:
        """What to try after these."""
        if (announced := self.first(scores)) is not None:
            return announced
        for best in ranked(scores):
            for point in self.neighbours(best):
                if point not in scores:
                    return point
        raise AssertionError("ladders have no end in the rate")

    def interior(self, point: Point, scores: Mapping[Point, float]) -> bool:
        """Whether all neighbours were tried."""
        return all(p in scores for p in self.neighbours(point))


def ranked(scores: Mapping[Point, float]) -> list[Point]:
    """Points by falling score; of equals the one tried first."""
    return sorted(scores, key=lambda point: -scores[point])


def search(ladder: Ladder, trials: int, score: Callable[[Point], float]) -> dict[Point, float]:
    """Scores of all points tried, in the order of the trials."""
    scores: dict[Point, float] = {}
    while len(scores) < trials:
        point = ladder.next(scores)
        scores[point] = score(point)
    return scores
