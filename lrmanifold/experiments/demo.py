"""One comparison on scikit-learn's digits: dense, its truncation, plain low rank, CondLR.

All methods start from the same dense network (of each seed) and take the same number of steps with
the same batches and momentum. Rate and weight decay were chosen for each method by the same search
on a validation split; the test images were not used for it.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg, robustness
from .._worst import worst
from .data import Dataset, load
from .factors import drawable, spectrum
from .methods import Method, Trained, comparison, train
from .models import build
from .training import Settings

LAYERS = ("fc1", "fc2")  # of the mlp; the third, which gives the class scores, stays dense
EXCLUDE = "fc3"
SHOWN = (0.05, 0.1, 0.15)


# Rate and weight decay of each method, from a validation split (benchmarks/demo_settings.py).
CHOSEN = {
    "dense": (0.1, 0.003),
    "plain low rank (A Bᵀ)": (0.05, 0.01),
    "CondLR tau=0": (0.1, 0.01),
    "CondLR tau=0.1": (0.1, 0.003),
    "CondLR tau=0.5": (0.1, 0.03),
}
ATTACKS: dict[str, Callable[..., Tensor]] = {"fgsm": robustness.fgsm, "pgd": robustness.pgd}


@dataclass(frozen=True)
class Demo:
    """What the demo does; everything has a default.

    Attributes
    ----------
    seeds : tuple of int
        One run of every method for each.
    rank : int
        Of both hidden layers, 256 x 64 and 256 x 256.
    lr : float, optional
        One rate for all methods, with the decay that was chosen for each; by default `CHOSEN`.
    strengths : tuple of float
        linf radii of the attacks, in units of pixels from 0 to 1; those in ``SHOWN`` are in the
        table, all in the picture.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 20
    rank: int = 32
    batch_size: int = 32
    momentum: float = 0.9
    lr: float | None = None
    strengths: tuple[float, ...] = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2)

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds must hold at least one integer, got none")

    def settings(self, method: Method, seed: int) -> Settings:
        """The training settings of one seed; truncation takes those of the dense network."""
        lr, decay = CHOSEN[method.name if method.kind != "svd" else "dense"]
        lr = lr if self.lr is None else self.lr
        common = Settings(self.epochs, self.batch_size, lr, self.momentum, seed)
        return dataclasses.replace(common, weight_decay=decay)

    def steps(self, data: Dataset) -> int:
        """Optimizer steps of all seeds and methods together (truncation takes none)."""
        trained = sum(method.kind != "svd" for method in comparison())
        batches = -(-len(data.train_y) // self.batch_size)
        return len(self.seeds) * trained * self.epochs * batches


@dataclass
class Outcome:
    """What came out for one method, a list entry for each seed that did not diverge.

    Attributes
    ----------
    cond : list of dict
        Condition number of each compressed layer by name: σ_max/σ_min over the singular values that
        the method has, all for the dense network, the r nonzero ones for the others (of the product
        for two factors).
    clean : list of float
        Accuracies in [0, 1]; so are `fgsm` and `pgd`, by strength.
    spectra : dict
        Of the first seed: by layer, the singular values before training and after every epoch.
    diverged : list of int
        Seeds whose loss was not finite.
    """

    method: Method
    weights_kept: float = float("nan")
    inference_kept: float = float("nan")
    cond: list[dict[str, float]] = dataclasses.field(default_factory=list)
    clean: list[float] = dataclasses.field(default_factory=list)
    fgsm: dict[float, list[float]] = dataclasses.field(default_factory=dict)
    pgd: dict[float, list[float]] = dataclasses.field(default_factory=dict)
    loss: list[float] = dataclasses.field(default_factory=list)
    spectra: dict[str, list[list[float]]] = dataclasses.field(default_factory=dict)
    diverged: list[int] = dataclasses.field(default_factory=list)

    @property
    def largest_cond(self) -> float:
        """Of any compressed layer and any seed; NaN if one is."""
        return worst(c for run in self.cond for c in run.values())

    def cells(self) -> Iterator[list[float]]:
        """Clean accuracy, then under FGSM and PGD at the strengths of the table, of all seeds."""
        yield self.clean
        for attack in (self.fgsm, self.pgd):
            yield from (attack.get(eps, []) for eps in SHOWN)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: accuracies by strength as text, lists over the seeds."""
        return {
            "name": self.method.name,
            "kind": self.method.kind,
            "tau": self.method.tau,
            "weights_kept": self.weights_kept,
            "inference_kept": self.inference_kept,
            "largest_cond": self.largest_cond,
            "cond": self.cond,
            "clean": self.clean,
            "fgsm": {f"{eps:g}": runs for eps, runs in self.fgsm.items()},
            "pgd": {f"{eps:g}": runs for eps, runs in self.pgd.items()},
            "final_loss": self.loss,
            "spectra": self.spectra,
            "diverged_seeds": self.diverged,
        }


@dataclass
class Comparison:
    """All outcomes, with what they were made from.

    Attributes
    ----------
    example : Trained
        The CondLR network of tau = 0.1 and the first seed.
    """

    demo: Demo
    data: Dataset
    outcomes: list[Outcome]
    seconds: float
    example: Trained | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": dataclasses.asdict(self.demo),
            "data": {
                "name": self.data.name,
                "train_images": len(self.data.train_y),
                "test_images": len(self.data.test_y),
                "note": self.data.note,
            },
            "seconds": round(self.seconds, 1),
            "methods": [{**o.to_dict(), **self._rates(o.method)} for o in self.outcomes],
        }

    def _rates(self, method: Method) -> dict[str, float]:
        settings = self.demo.settings(method, self.demo.seeds[0])
        return {"lr": settings.lr, "weight_decay": settings.weight_decay}

    def verdicts(self) -> list[str]:
        """In words, for each tau: in how many attack columns it is ahead of each other method."""
        twins = [o for o in self.outcomes if o.method.kind != "condlr" and o.clean]
        lines = []
        columns = 2 * sum(eps in self.demo.strengths for eps in SHOWN)
        for ours in (o for o in self.outcomes if o.method.kind == "condlr" and o.clean and columns):
            counts = []
            for twin in twins:
                pairs = list(zip(ours.cells(), twin.cells(), strict=True))[1:]
                gaps = [statistics.fmean(a) - statistics.fmean(b) for a, b in pairs if a and b]
                ahead = sum(gap > 0 for gap in gaps)
                counts.append(f"{twin.method.name} {ahead} ({100 * statistics.fmean(gaps):+.1f})")
            lines.append(
                f"{ours.method.name}, of {columns} attack columns ahead of: " + "; ".join(counts)
            )
        return lines


def run(
    demo: Demo,
    *,
    on_start: Callable[[str], None] | None = None,
    on_step: Callable[[], None] | None = None,
) -> Comparison:
    """Train and attack all methods.

    Parameters
    ----------
    demo : Demo
    on_start : callable, optional
        Called with words before each training.
    on_step : callable, optional
        Called after each optimizer step.
    """
    began = time.perf_counter()
    data = load("digits")
    result = Comparison(demo, data, [Outcome(method) for method in comparison()], 0.0)
    for seed in demo.seeds:
        dense: Trained | None = None
        for outcome in result.outcomes:
            method = outcome.method
            if on_start is not None:
                on_start(f"{method.name}, seed {seed}")
            try:
                if method.kind == "svd" and dense is None:
                    raise FloatingPointError("there is no dense network to truncate")
                trained = train(
                    method,
                    functools.partial(build, "mlp", data),
                    data,
                    demo.rank,
                    demo.settings(method, seed),
                    exclude=EXCLUDE,
                    dense=dense,
                    on_step=on_step,
                )
            except FloatingPointError:
                outcome.diverged.append(seed)
                continue
            if method.kind == "dense":
                dense = trained
            if method.tau == 0.1 and result.example is None:
                result.example = trained
            _measure(outcome, trained, data, demo, seed)
    result.seconds = time.perf_counter() - began
    return result


def _measure(outcome: Outcome, trained: Trained, data: Dataset, demo: Demo, seed: int) -> None:
    model = trained.model
    outcome.weights_kept, outcome.inference_kept = trained.weights_kept, trained.inference_kept
    outcome.loss.append(trained.history.loss[-1])
    if not outcome.spectra and outcome.method.kind not in ("dense", "svd"):
        spectra = trained.history.spectra.items()
        outcome.spectra = {name.removeprefix("network."): list(s) for name, s in spectra}
    kept = None if outcome.method.kind == "dense" else demo.rank
    layers = {name: model.network.get_submodule(name) for name in LAYERS}
    outcome.cond.append({name: condition(layer, kept) for name, layer in layers.items()})
    test = (data.test_x, data.test_y)
    clean = robustness.accuracy_under_attack(model, test, robustness.fgsm, [0.0])
    outcome.clean.append(clean[0.0])
    options: dict[str, Any]
    for key, attack in ATTACKS.items():
        options = {"generator": torch.Generator().manual_seed(seed)} if key == "pgd" else {}
        found = robustness.accuracy_under_attack(model, test, attack, demo.strengths, **options)
        for eps, accuracy in found.items():
            getattr(outcome, key).setdefault(eps, []).append(accuracy)


def condition(layer: nn.Module, rank: int | None = None) -> float:
    """σ_1/σ_r of a layer's weight (of the product, for two factors); all of them for None."""
    s = spectrum(layer)
    if s is None:
        weight: Any = layer.weight
        s = linalg.svdvals(weight.detach().flatten(1).double())[None, :rank]
    return float((s[:, 0] / s[:, -1]).max())


def pictures(result: Comparison) -> dict[str, Any]:
    """File names and figures: accuracy under attack, and singular values over training."""
    from .. import viz

    with_runs = [o for o in result.outcomes if o.clean]
    found: dict[str, Any] = {}
    if with_runs:
        panels = {
            title: {o.method.name: {0.0: o.clean, **getattr(o, key)} for o in with_runs}
            for key, title in (("fgsm", "FGSM"), ("pgd", "PGD, 20 steps"))
        }
        found["accuracy.png"] = viz.accuracy_panels(panels, relative_to=with_runs[0].method.name)
    known = {o.method.name: o.spectra["fc2"] for o in with_runs if "fc2" in o.spectra}
    if spectra := drawable(known):
        found["spectra.png"] = viz.spectra(
            spectra,
            tau={o.method.name: o.method.tau for o in with_runs},
            title="Singular values of layer fc2 (256 x 256) during training",
        )
    return found
