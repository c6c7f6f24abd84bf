"""What the lines of a table say together: families, chosen settings, paired intervals, pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..robustness.measures import unpacked
from ..robustness.plan import Family, Hypothesis, Plan, PlanError, load
from ..robustness.runner import mean, scored, searched
from ..robustness.search import Ladder, ranked
from ..robustness.table import Table

Row = Mapping[str, Any]
SLACK = 0.001  # of clean accuracy: so much less is "as accurate"
ROUNDING = 2e-6  # rows hold six digits: means that differ by less are of as many images
LEAST_SEEDS = 5  # for a verdict
CHANCE = 0.15  # all data have ten classes; MNIST's most frequent one is 11 % of its images


def strength(eps: float) -> str:
    """For tables: 2/255 where it is a whole number of grey levels and no short decimal."""
    levels = 255 * eps
    if abs(levels - round(levels)) < 1e-6 and round(eps, 3) != eps:
        return f"{round(levels)}/255"
    return f"{eps:g}"


@dataclass
class Group:
    """The seeds of one chosen setting of a family, on the test images."""

    family: Family
    rows: list[Row]

    @property
    def done(self) -> list[Row]:
        """Seeds that did not diverge."""
        return [row for row in self.rows if not row.get("diverged")]

    @property
    def trained(self) -> list[Row]:
        """Seeds that did not diverge and are right on more test images than chance is."""
        return [row for row in self.done if row["clean"]["accuracy"] > CHANCE]

    @property
    def shares(self) -> list[float]:
        """Robust shares of the scores that chose it."""
        return self.rows[0]["shares"]

    def values(self, *path: str) -> dict[int, float]:
        """A number by seed. A network that diverged is right on no image."""
        found = {}
        for row in self.rows:
            value: Any = 0.0 if row.get("diverged") else row
            for key in () if row.get("diverged") else path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, (int, float)):
                found[row["seed"]] = float(value)
        return found

    def images(self, *path: str) -> dict[int, Any]:
        """By seed, on which images the network is right; only of rows that say so."""
        by_seed = {row["seed"]: _marks(row, path) for row in self.rows}
        found = {seed: marks for seed, marks in by_seed.items() if marks is not None}
        if found:
            none = np.zeros_like(next(iter(found.values())))
            found |= {row["seed"]: none for row in self.rows if row.get("diverged")}
        return found

    def mean(self, *path: str) -> float:
        """Over the seeds."""
        return float(np.mean(list(self.values(*path).values())))

    def spread(self, *path: str) -> float:
        """Standard deviation over the seeds; 0 for one."""
        found = list(self.values(*path).values())
        return float(np.std(found, ddof=1)) if len(found) > 1 else 0.0


def _marks(row: Row, path: Sequence[str]) -> Any:
    """Which images stand at ``path``, the place of an accuracy; None in rows of before."""
    if row.get("diverged"):
        return None
    place: Any = row
    for key in path[:-1]:
        place = place[key]
    text = place.get("right", place.get("robust"))
    return None if text is None else unpacked(text, place.get("images", row["images"]))


@dataclass
class Results:
    """A plan with all lines that belong to it; lines of an earlier plan do not count."""

    plan: Plan
    trials: Sequence[Row]
    groups: list[Group]
    missing: tuple[str, ...] = ()  # families of the plan without a row on the test images
    begun: Mapping[int, int] = dataclasses.field(default_factory=dict)  # rows of unfinished seeds
    earlier: Sequence[Row] = ()  # trials of the search whose finals these are

    @property
    def seeds(self) -> list[int]:
        """Those that are done; of the plan's, all or the first few."""
        return sorted({row["seed"] for group in self.groups for row in group.rows})

    @property
    def eps(self) -> str:
        """The strength of the score, as rows name it."""
        return f"{self.plan.attack.eps:g}"

    def column(self, name: str, eps: float | None = None) -> tuple[str, ...]:
        """The path of "clean" or "worst" in a row, by default at the strength of the score."""
        if name == "clean":
            return ("clean", "accuracy")
        return ("worst", self.eps if eps is None else f"{eps:g}", "accuracy")

    def of(self, family: str) -> Sequence[Row]:
        """Its trials, in their order."""
        return [t for t in self.trials if t["family"] == family]

    def score(self, trial: Row) -> float:
        """*The* score, on validation images."""
        return scored(trial, self.plan.search.robust_share[0])

    def best(self, family: str) -> Row:
        """The trial that validation chose."""
        return max(self.of(family), key=self.score)

    def speaks(self, families: Iterable[str]) -> Group:
        """The main setting of the family that validation scores best."""
        name = max(families, key=lambda family: self.score(self.best(family)))
        return next(g for g in self.main() if g.family.name == name)

    def main(self) -> list[Group]:
        """The settings that *the* score chose, one a family."""
        share = self.plan.search.robust_share[0]
        return [g for g in self.groups if share in g.shares]

    def interior(self, family: Family) -> bool:
        """Whether the best setting of the search has all its neighbours among the trials."""
        ladder = Ladder(self.plan.axes_of(family), family.start)
        trials = [t for t in self.earlier or self.trials if t["family"] == family.name]
        scores = {tuple(t["point"]): self.score(t) for t in trials}
        return ladder.interior(ranked(scores)[0], scores)


def read(folder: Path) -> Results | None:
    """The results beside a plan, of the seeds that all families have; None while there is none."""
    plan = load(folder / "plan.toml")
    trials, rows = (
        [r for r in Table(folder / f"{n}.jsonl").rows() if r["plan"] == plan.digest]
        for n in ("trials", "runs")
    )
    groups: dict[tuple[str, str], Group] = {}
    for row in rows:
        key = (row["family"], repr(sorted(row["values"].items())))
        groups.setdefault(key, Group(plan.family(row["family"]), [])).rows.append(row)
    scores: dict[str, set[float]] = {}
    for group in groups.values():
        scores.setdefault(group.family.name, set()).update(group.shares)
    # a family is there with all its chosen settings or not at all
    there = {name for name, own in scores.items() if own >= {*plan.search.robust_share}}
    groups = {key: g for key, g in groups.items() if g.family.name in there}
    needed = {plan.reference, *(n for h in plan.hypotheses for n in (*h.better, *h.than))}
    if not needed <= there:
        return None
    missing = tuple(f.name for f in plan.families if f.name not in there)
    plan = dataclasses.replace(plan, families=tuple(f for f in plan.families if f.name in there))
    trials = [row for row in trials if row["family"] in there]
    seeds = [{row["seed"] for row in g.rows} for g in groups.values()]
    whole = set.intersection(*seeds)
    begun = {s: sum(s in own for own in seeds) for s in sorted(set.union(*seeds) - whole)}
    for group in groups.values():
        own = {row["seed"]: row for row in group.rows}  # processes may finish in another order
        group.rows = [own[seed] for seed in plan.seeds if seed in whole]
    if not whole:
        return None
    earlier = searched(plan, folder) if plan.earlier else ()
    found = Results(plan, trials, list(groups.values()), missing, begun, earlier)
    _check_one_search(found)
    return found


def _check_one_search(results: Results) -> None:
    """Refuse rows of two searches: which of their settings counts would hang on the rows' order."""
    plan, asked = results.plan, results.plan.search.trials
    for group in results.main():
        name, values = group.family.name, group.rows[0]["values"]
        if not 0 < (count := len(results.of(name))) <= asked:
            raise PlanError(f"{plan.name}: {name} has {count} trials where the plan has {asked}")
        if (chosen := results.best(name)["values"]) != values:
            raise PlanError(f"{plan.name}: rows of {name} have {values}, its trials chose {chosen}")


# --------------------------------------------------------------------------------- hypotheses


@dataclass(frozen=True)
class Finding:
    """A hypothesis and what came out: points, with a paired interval; trials of each side."""

    hypothesis: Hypothesis
    better: str
    than: str
    difference: float
    low: float
    high: float
    seeds: int
    trials: tuple[int, int]
    over_images: bool  # the interval covers other test images too
    planned: int  # seeds of the plan
    untrained: str = ""  # why no seed of `than` learned: whatever it is compared with is ahead

    @property
    def verdict(self) -> str:
        """Only from five seeds or more; before the last one of the plan it says so.

        Who looks after every seed and stops at a yes would find one too often.
        """
        margin = self.hypothesis.margin
        if self.seeds < LEAST_SEEDS:
            return f"no verdict from {self.seeds} seed{'' if self.seeds == 1 else 's'}"
        if self.untrained:
            return f"no verdict, {self.than} {self.untrained} in every seed"
        word = "not decided"
        if self.low > margin:
            word = "yes"
        elif self.high < margin:
            word = "no"
        if self.seeds < self.planned:
            word += f" so far, {self.seeds} of {self.planned} seeds"
        return word


def findings(results: Results) -> list[Finding]:
    """Of all hypotheses; the intervals hold together at 95 % (Bonferroni)."""
    hypotheses = results.plan.hypotheses
    found = []
    for hypothesis in hypotheses:
        ours, theirs = (results.speaks(names) for names in (hypothesis.better, hypothesis.than))
        path = results.column(hypothesis.column, hypothesis.eps)
        one, other = ours.values(*path), theirs.values(*path)
        seeds = sorted(one.keys() & other.keys())
        d = np.array([[100 * (one[s] - other[s])] for s in seeds])
        marks = [group.images(*path) for group in (ours, theirs)]
        if all(s in by_seed for by_seed in marks for s in seeds):
            d = 100 * np.array([marks[0][s] * 1.0 - marks[1][s] for s in seeds])
        middle, half = float(np.mean(d)), half_width(d, 0.05 / len(hypotheses))
        mine, rivals = (
            sum(len(results.of(family)) for family in side)
            for side in (hypothesis.better, hypothesis.than)
        )
        names, ends = (ours.family.name, theirs.family.name), (middle - half, middle + half)
        over = d.shape[1] > 1
        why = "" if theirs.trained else "was at chance" if theirs.done else "diverged"
        if why and 0 < len(theirs.done) < len(theirs.rows):
            why = "diverged or was at chance"
        count, planned = len(seeds), len(results.plan.seeds)
        found.append(
            Finding(hypothesis, *names, middle, *ends, count, (mine, rivals), over, planned, why)
        )
    return found


def half_width(differences: Any, error: float) -> float:
    """Of the two-sided t interval of the mean of paired differences (seeds, images) in points.

    Seeds and images are both drawn at random: the variances of their means add up (what is left
    over counts twice, which only widens the interval), and Satterthwaite gives the degrees of
    freedom: too many where few seeds differ much, so the interval is never narrower than the one
    over the seeds alone. Nor narrower than the share of images that a draw misses altogether with a
    chance of `error` / 2: where hardly any differ, as in clean accuracy, t intervals are far too
    short. One column: only the seeds are drawn. Infinite for one seed.
    """
    from scipy.special import stdtrit  # the quantile of t; scipy.stats adds its price

    count, images = differences.shape
    if count < 2:
        return math.inf
    parts, least = [(np.var(differences.mean(1), ddof=1) / count, count - 1)], 0.0
    if images > 1:
        parts.append((np.var(differences.mean(0), ddof=1) / images, images - 1))
        least = 100 * float(1 - (error / 2) ** (1 / images))
    whole = sum(v for v, _ in parts)
    if not whole:
        return least
    freedom = whole**2 / sum(v**2 / n for v, n in parts)
    widths = [stdtrit(n, 1 - error / 2) * math.sqrt(v) for v, n in ((whole, freedom), parts[0])]
    return max(least, *map(float, widths))


# -------------------------------------------------------------------------------- the frontier

Point = tuple[float, float]


def efficient(items: Sequence[Any], at: Callable[[Any], Point]) -> list[Any]:
    """Those that no other beats in both coordinates, by falling first coordinate."""
    found: list[Any] = []
    for item in sorted(items, key=at, reverse=True):
        if found and at(item)[1] <= at(found[-1])[1] + ROUNDING:
            continue
        while found and at(found[-1])[0] <= at(item)[0] + ROUNDING:
            found.pop()
        found.append(item)
    return found


def trial_point(trial: Row) -> Point:
    """Clean and worst-case accuracy on validation images."""
    return mean(trial["clean"]), mean(trial["worst"])


def pairs(ours: Sequence[Point], theirs: Sequence[Point]) -> tuple[int, int]:
    """In how many pairs is ours as accurate, and in how many of these harder to fool?"""
    equal = [(a, b) for a in ours for b in theirs if a[0] >= b[0] - SLACK - ROUNDING]
    return sum(a[1] > b[1] + ROUNDING for a, b in equal), len(equal)
