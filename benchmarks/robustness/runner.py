"""Goes through a plan: search, train, measure, one line a result; skips what is done."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lrmanifold.experiments.data import Dataset, validation_split
from lrmanifold.experiments.methods import Trained, train

from .. import _shared, models
from .._record import conditions
from .._shared import alone
from . import measures
from .plan import Family, Plan, PlanError, load, registered
from .search import Ladder, Point, ranked, search
from .table import Table, finite

Log = Callable[[str], None]
_EVERY = 0.5  # seconds between two looks at what other processes do


class OutOfTimeError(Exception):
    """The time for this call is over; everything up to the last checkpoint is kept."""


@dataclasses.dataclass
class Runner:
    """Work on one table; processes started alike share it.

    Attributes
    ----------
    folder : path
        Of ``plan.toml``; gets ``trials.jsonl`` and ``runs.jsonl``.
    scratch : path
        Folder of checkpoints, never committed.
    root : path or None
        Of the data; None: the environment variable.
    minutes : float
        Nothing is begun later than this, and training stops.
    save_every : int
        Batches between two checkpoints.
    unregistered : bool
        Run though the plan is not committed; the rows say so.
    keep : bool
        Keep the networks of the test in `scratch`, ``KEY.network.pt``.
    """

    folder: Path
    scratch: Path
    root: str | None = None
    device: str = "cpu"
    minutes: float = math.inf
    save_every: int = 500
    unregistered: bool = False
    log: Log = print
    keep: bool = False

    def __post_init__(self) -> None:
        path = self.folder / "plan.toml"
        self.plan: Plan = load(path)
        self.commit = registered(path)
        if self.commit is None and not self.unregistered:
            raise PlanError(f"{path}: commit the plan before the runs, or call --unregistered")
        self.trials, self.rows = (Table(self.folder / f"{n}.jsonl") for n in ("trials", "runs"))
        self._data: dict[Any, Dataset] = {}
        self._there: dict[int, Dataset] = {}
        self._chosen: dict[str, list[tuple[dict[str, float], list[float]]]] = {}
        # of the code that was imported, whatever is committed while it runs
        self._conditions = conditions()
        self._deadline = time.monotonic() + 60 * self.minutes

    def go(self) -> bool:
        """Do what is missing; True if nothing is left to do, False if the time ran out."""
        families = self.plan.families
        try:
            # a search goes step by step: one process is at it
            self._shared_out(
                (self._key("search", family.name), functools.partial(self.chosen, family))
                for family in families
            )
            settings = [(f, v, shares) for f in families for v, shares in self.chosen(f)]
            self._shared_out(
                (
                    self._key("run", family.name, values, seed),
                    functools.partial(self.row, family, values, shares, seed),
                )
                for seed in self.plan.seeds
                for family, values, shares in settings
            )
        except OutOfTimeError:
            self.log("the time for this call is over; start it again to go on")
            return False
        return True

    def _shared_out(self, tasks: Iterable[tuple[str, Callable[[], Any]]]) -> None:
        """Do all, in order; what other processes are at comes last, should they not finish it."""
        left = list(tasks)
        while left:
            busy = []
            for key, do in left:
                with alone(self.folder / key, wait=False) as mine:
                    if mine:
                        do()
                    else:
                        busy.append((key, do))
            if len(busy) == len(left):
                self._check_time()
                time.sleep(_EVERY)
            left = busy

    def take(self, folder: Path) -> int:
        """Add what another process or machine measured of this very plan; how many rows.

        A machine without the repository's history leaves the commit open; the digest says which.
        """
        count = 0
        if not any((folder / f"{name}.jsonl").is_file() for name in ("trials", "runs")):
            raise FileNotFoundError(f"{folder}: holds neither trials.jsonl nor runs.jsonl")
        for ours, name in ((self.trials, "trials"), (self.rows, "runs")):
            known = {row["key"] for row in ours.rows()}
            for row in Table(folder / f"{name}.jsonl").rows():
                if row["plan"] != self.plan.digest or row["key"] in known:
                    continue
                if name == "runs":
                    row["plan_commit"] = row["plan_commit"] or self.commit
                ours.append(row)
                count += 1
        return count

    # -------------------------------------------------------------------------------- choosing

    def chosen(self, family: Family) -> list[tuple[dict[str, float], list[float]]]:
        """The settings that validation chooses, each with the robust shares of its scores."""
        if family.name in self._chosen:
            return self._chosen[family.name]
        ladder = Ladder(self.plan.axes_of(family), family.start)
        found: dict[Point, dict[str, Any]] = {}
        shares = self.plan.search.robust_share

        def score(point: Point) -> float:
            found[point] = self.trial(family, point, ladder.values(point) or {})
            return scored(found[point], shares[0])

        if self.plan.earlier is None:
            scores = search(ladder, self.plan.search.trials, score)
        else:
            scores = {point: score(point) for point in self._finalists(family, self.plan.earlier)}
        best: dict[Point, list[float]] = {}
        for share in shares:
            by_share = {point: scored(found[point], share) for point in scores}
            best.setdefault(ranked(by_share)[0], []).append(share)
        settings = [(ladder.values(point) or {}, its) for point, its in best.items()]
        self._chosen[family.name] = settings
        return settings

    def _finalists(self, family: Family, earlier: Plan) -> list[Point]:
        """The best points of the earlier plan's search."""
        share = self.plan.search.robust_share[0]
        scores = {
            tuple(row["point"]): scored(row, share)
            for row in searched(self.plan, self.folder)
            if row["family"] == family.name
        }
        if len(scores) < earlier.search.trials:
            raise PlanError(
                f"finals_of {earlier.name}: {family.name} has {len(scores)} of "
                f"{earlier.search.trials} trials there; first run python -m benchmarks.robustness "
                f"{earlier.name}"
            )
        return ranked(scores)[: self.plan.search.trials]

    def trial(self, family: Family, point: Point, values: dict[str, float]) -> dict[str, Any]:
        """One setting on held-out training images, a mean over the seeds of the search."""
        key = self._key("trial", family.name, values)
        known = {row["key"]: row for row in self.trials.rows()}
        if key in known:
            return known[key]
        asked, began = self.plan.search, time.process_time()
        clean, worst, attacks = [], [], []
        for seed in asked.seeds:
            trained = self._train(family, values, seed, f"{key}-{seed}", trial=True)
            if trained is None:
                clean.append(0.0)
                worst.append(0.0)
                continue
            split = self._split(seed)
            images = measures.drawn(split, asked.images)
            found = measures.worst_case(
                measures.laid_out(trained.model),
                images,
                self.plan.attack.eps,
                asked,
                self.plan.attack.norm,
            )
            clean.append(measures.clean(trained.model, split)["accuracy"])
            worst.append(found["accuracy"])
            attacks = found["attacks"]
        row = {
            "key": key,
            "plan": self.plan.digest,
            "family": family.name,
            "point": point,
            "values": values,
            "clean": clean,
            "worst": worst,
            "attacks": attacks,
            "conditions": self._conditions,
            "cpu_seconds": time.process_time() - began,
        }
        row = finite(row)  # as it is read again: the search repeats itself to the point
        self.trials.append(row)
        self.log(
            f"trial {family.name} {values}: clean {100 * mean(clean):.1f}, "
            f"worst {100 * mean(worst):.1f}, {row['cpu_seconds']:.1f} s"
        )
        return row

    # ------------------------------------------------------------------------------- measuring

    def row(self, family: Family, values: dict[str, float], shares: list[float], seed: int) -> None:
        """Train a chosen setting on all training images and measure it on the test images."""
        key = self._key("run", family.name, values, seed)
        if key in {row["key"] for row in self.rows.rows()}:
            return
        head = {
            "key": key,
            "plan": self.plan.digest,
            "plan_commit": self.commit,
            "family": family.name,
            "values": values,
            "shares": shares,
            "seed": seed,
            "device": self.device,
            "conditions": self._conditions,
        }
        began = time.process_time()
        trained = self._train(family, values, seed, key)
        if trained is None:
            self.rows.append({**head, "diverged": True})
            self.log(f"run {family.name}, seed {seed}: diverged")
            return
        seconds = time.process_time() - began
        if self.keep:
            torch.save(trained.model, self.scratch / f"{key}.network.pt")
        data = self._dataset()
        source = self._source(seed) if self.plan.attack.transfer else None
        first = seed == self.plan.seeds[0]
        found = measures.everything(trained, data, self.plan, source, once=first)
        self.rows.append({**head, "note": data.note, "train_cpu_seconds": seconds, **found})
        self._forget(key)
        self.log(
            f"run {family.name}, seed {seed}: clean {100 * found['clean']['accuracy']:.1f}, "
            f"worst {100 * found['worst'][f'{self.plan.attack.eps:g}']['accuracy']:.1f}, "
            f"{time.process_time() - began:.1f} s"
        )

    def _source(self, seed: int) -> torch.nn.Module | None:
        """The reference network of another start and another order of batches."""
        family = self.plan.family(self.plan.reference)
        values = self.chosen(family)[0][0]
        key = self._key("source", values, seed)
        with alone(self.folder / key):  # rows of a seed share it: it stays in its checkpoint
            trained = self._train(family, values, 10_000 + seed, key)
        return None if trained is None else trained.model

    def _train(
        self, family: Family, values: dict[str, float], seed: int, key: str, *, trial: bool = False
    ) -> Trained | None:
        """The network; None if it diverged: that is a result, no reason for another rate."""
        plan, network = self.plan, self.plan.network
        data = self._split(seed) if trial else self._dataset()
        epochs = plan.search.epochs if trial else None
        method, settings = plan.made(family, values, seed, epochs)
        path = self._checkpoint(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = train(
                method,
                lambda: models.build(family.model or network.model, data),
                self._resident(data),
                dict(family.ranks or network.ranks),
                settings,
                exclude=network.exclude or None,
                keep_larger=True,
                device=self.device,
                on_step=self._check_time,
                checkpoint=None if trial and settings.steps(data) < self.save_every else path,
                save_every=self.save_every,
                adversarial=plan.adversarial,
                replay=True,
            )
            measures.check_logits(found.model, data)
            trained: Trained | None = found
        except FloatingPointError as error:
            self.log(f"{family.name} {values}, seed {seed}: {error}")
            trained = None
        if trial or trained is None:
            self._forget(key)
        return trained

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise OutOfTimeError

    # ------------------------------------------------------------------------------------ data

    def _dataset(self) -> Dataset:
        if "all" not in self._data:
            name, samples = self.plan.network.data, self.plan.network.samples
            data = _shared.load(name, self.root)
            measures.check_drawn(data, self.plan.attack)
            if samples is not None and samples < len(data.train_y):
                order = torch.randperm(len(data.train_y), generator=_generator(0))[:samples]
                x, y = data.train_x[order], data.train_y[order]
                data = dataclasses.replace(data, train_x=x, train_y=y)
            self._data["all"] = data
        return self._data["all"]

    def _resident(self, data: Dataset) -> Dataset:
        """With the training images on the device: copying every batch would take longer."""
        if self.device == "cpu":
            return data
        if id(data) not in self._there:
            x, y = data.train_x.to(self.device), data.train_y.to(self.device)
            self._there[id(data)] = dataclasses.replace(data, train_x=x, train_y=y)
        return self._there[id(data)]

    def _split(self, seed: int) -> Dataset:
        if seed not in self._data:
            share = self.plan.search.validation
            self._data[seed] = validation_split(self._dataset(), share, seed)
        return self._data[seed]

    def _checkpoint(self, key: str) -> Path:
        return self.scratch / f"{key}.pt"

    def _forget(self, key: str) -> None:
        """Remove a training's checkpoint, and that of its first half if it had two."""
        for path in self.scratch.glob(f"*{key}.pt"):
            path.unlink(missing_ok=True)

    def _key(self, *parts: Any) -> str:
        text = json.dumps([self.plan.digest, *parts], sort_keys=True, ensure_ascii=False)
        return f"{self.plan.name}-{hashlib.sha256(text.encode()).hexdigest()[:14]}"


def searched(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """Trials of the search itself: the plan's own, or of the plan whose finals it holds."""
    source = plan.earlier or plan
    table = Table(folder.parent / source.name / "trials.jsonl")
    return [row for row in table.rows() if row["plan"] == source.digest]


def scored(trial: Mapping[str, Any], share: float) -> float:
    """(1 - share) clean + share worst case, means over the seeds of the search.

    Rounded, so that the same number of images is a tie whatever the order of the sums.
    """
    return round((1 - share) * mean(trial["clean"]) + share * mean(trial["worst"]), 9)


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
