"""Goes through the runs of experiments: tune, train, measure, write a row; skips what is done."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from lrmanifold.experiments import data
from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.runs import write_json
from lrmanifold.experiments.training import Normalized

from .._record import conditions
from . import evaluation, measures
from .display import Display
from .experiment import Experiment, Run
from .methods import truncated
from .table import Table
from .training import Outcome, OutOfTimeError, train
from .tuning import subset, tuned_rate


@dataclasses.dataclass
class Runner:
    """Work on one table.

    Attributes
    ----------
    results : path
        Folder of ``runs.jsonl`` and ``tuning.jsonl``.
    scratch : path
        Folder of checkpoints, never committed.
    root : path or None
        Of the data; None: the environment variable.
    minutes : float
        No epoch and no measure is begun later than this.
    seeds : collection of int or None
        Only runs with these.
    """

    results: Path
    scratch: Path
    root: str | None = None
    device: str = "cpu"
    amp: bool = False
    minutes: float = math.inf
    seeds: Collection[int] | None = None

    def __post_init__(self) -> None:
        self.table = Table(self.results / "runs.jsonl")
        self.trials = Table(self.results / "tuning.jsonl")
        self._data: dict[tuple[str, int | None], Dataset] = {}
        self._deadline = time.monotonic() + 60 * self.minutes

    def go(self, experiments: Iterable[Experiment], display: Display) -> bool:
        """Do what is missing; True if nothing is left to do, False if the time ran out."""
        runs = [run for experiment in experiments for run in experiment.runs()]
        if self.seeds is not None:
            runs = [run for run in runs if run.seed in self.seeds]
        done = {row["key"] for row in self.table.rows()}
        display.start(len(runs), sum(run.row_key in done for run in runs))
        try:
            for run in runs:
                if run.row_key not in done:
                    display.begin(f"{run.experiment}: {run.method.name}, seed {run.seed}")
                    self.table.append(self.row(run, display))
                    display.finish_run()
        except OutOfTimeError:
            display.log("the time for this call is over; start it again to go on")
            return False
        return True

    def row(self, run: Run, display: Display) -> dict[str, Any]:
        """Tune, train and measure one run."""
        dataset = self.dataset(run)
        tuned = _as_trained(run)
        lr, budget = tuned_rate(
            tuned, dataset, self.trials, device=self.device, amp=self.amp, log=display.log
        )
        begin = time.perf_counter()
        try:
            outcome, lr = self._train(tuned, dataset, lr, display)
        except FloatingPointError as error:
            return self._head(run, lr, budget) | {"failed": str(error)}
        model = outcome.trainee.model
        if run.method.kind == "svd":
            model = truncated(model, run)
        source = self._source(run, dataset, display)
        folder = self.scratch / run.key
        planned = evaluation.plan(
            model, dataset, run.attacks, once=run.first, source=source, device=self.device
        )
        found = evaluation.evaluate(
            planned, folder, run.attacks, deadline=self._deadline, log=display.log
        )
        row = self._head(run, lr, budget) | self._facts(run, outcome, model, dataset) | found
        row["wall_seconds"] = round(time.perf_counter() - begin, 2)
        clean = 100 * row["clean"]["accuracy"]
        display.log(f"{run.method.name}, seed {run.seed}: lr {lr:g}, clean {clean:.2f} %")
        return row

    def dataset(self, run: Run) -> Dataset:
        """The run's data, read once."""
        key = (run.training.data, run.training.samples)
        if key not in self._data:
            root = None if run.training.data == "digits" else self.root
            self._data[key] = subset(data.load(run.training.data, root), run.training.samples)
        return self._data[key]

    def _train(
        self, run: Run, dataset: Dataset, lr: float, display: Display
    ) -> tuple[Outcome, float]:
        """Train; a tuned rate that diverges over the whole length gives way to the next lower one.

        The rate that was used stands in the row, and is kept beside the checkpoint.
        """
        folder = self.scratch / run.key
        lower = [] if run.method.lr is not None else run.tuning.rates(run.method)
        rates = [lr, *sorted((r for r in lower if r < lr), reverse=True)]
        chosen = folder / "rate.json"
        first = json.loads(chosen.read_bytes()) if chosen.is_file() else lr
        for rate in (r for r in rates if r <= first):
            write_json(chosen, rate)
            try:
                outcome = train(
                    run,
                    dataset,
                    rate,
                    folder,
                    device=self.device,
                    amp=self.amp,
                    on_batch=display.batch,
                    deadline=self._deadline,
                )
            except FloatingPointError as error:
                display.log(f"{run.method.name}, seed {run.seed}: {error}")
                (folder / "checkpoint.pt").unlink(missing_ok=True)
                last = error
                continue
            return outcome, rate
        raise last

    def _source(self, run: Run, dataset: Dataset, display: Display) -> Normalized | None:
        """The reference network of *another* seed's start would be a new training: same seed's."""
        if run.reference is None:
            return None
        reference = run.reference
        lr, _ = tuned_rate(
            reference, dataset, self.trials, device=self.device, amp=self.amp, log=display.log
        )
        return self._train(reference, dataset, lr, display)[0].trainee.model

    def _head(self, run: Run, lr: float, budget: dict[str, Any]) -> dict[str, Any]:
        return {
            "key": run.row_key,
            "experiment": run.experiment,
            "name": run.method.name,
            "seed": run.seed,
            "first": run.first,
            "lr": lr,
            "tuning": budget,
            "method": dataclasses.asdict(run.method),
            "training": dataclasses.asdict(run.training),
            "attacks": dataclasses.asdict(run.attacks),
            "device": self.device,
            "amp": self.amp,
            "conditions": conditions(),
        }

    @staticmethod
    def _facts(run: Run, outcome: Outcome, model: Normalized, dataset: Dataset) -> dict[str, Any]:
        image = dataset.test_x[:1].to(model.mean.device)
        history = outcome.history
        facts: dict[str, Any] = {
            "parameters": measures.sizes(model, outcome.trainee.dense_parameters),
            "multiply_adds": measures.multiply_adds(model, image),
            "layers": measures.layer_conds(model),
            "cond": history.cond,
            "loss": history.loss,
            "epoch_seconds": outcome.epoch_seconds,
            "evaluations": outcome.evaluations,
            "steps": outcome.steps,
            "note": dataset.note,
        }
        if run.first:
            facts["spectra"] = measures.spectra(history)
        return facts


def _as_trained(run: Run) -> Run:
    """SVD truncation trains the dense network, with its rate and its checkpoint."""
    if run.method.kind != "svd":
        return run
    method = dataclasses.replace(run.method, kind="dense", rank=None)
    return dataclasses.replace(run, method=method, ranks=None)


def threads(count: int | None) -> None:
    """Number of CPU threads, if it is given."""
    if count is not None:
        torch.set_num_threads(count)
