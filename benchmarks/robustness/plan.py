"""A plan: what is compared, how settings are chosen, what is expected. Written before the runs.

``benchmarks/results/robustness/NAME/plan.toml`` lies beside its table. Its tables are the classes
below, field by field; a field that does not exist is an error. Rows carry the plan's digest: after
a change of the plan no row of before counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrmanifold.experiments.adversarial import NORMS, Adversarial
from lrmanifold.experiments.methods import Method
from lrmanifold.experiments.training import Settings

from .search import Axis

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Axes that every family has, and those that belong to one kind.
COMMON = ("lr", "weight_decay", "label_smoothing")
OWN = ("penalty", "finetune")
COLUMNS = ("clean", "worst")


class PlanError(ValueError):
    """A plan asks for something that does not exist."""


@dataclass(frozen=True)
class Network:
    """``[network]``: images and model. `ranks` are patterns to ranks or shares; `samples`: only so
    many training images, drawn at random; `exclude`: layers that stay dense in every family."""

    data: str
    model: str
    ranks: Mapping[str, float]
    exclude: tuple[str, ...] = ()
    samples: int | None = None


@dataclass(frozen=True)
class Search:
    """``[search]``: how settings are chosen, on held-out training images alone.

    Attributes
    ----------
    trials : int
        Settings that are tried for every family.
    finals_of : str or None
        Another plan, whose search is finished: its best `trials` settings of every family are
        trained again with these seeds, and no others. What was best by luck does not stay so.
    seeds : tuple of int
        Of the split and the training; a trial is the mean over them.
    validation : float
        Share of the training images that is held out.
    robust_share : tuple of float
        The score is (1 - s) clean + s worst case. The first s is *the* score; the settings that
        the others choose among the same trials are further points of the frontier.
    epochs : int or None
        Of a trial; None: as many as in the test.
    images : int
        Held-out images that are attacked.
    attacks, steps, restarts, queries
        As in :func:`lrmanifold.robustness.worst_case`.
    """

    trials: int
    seeds: tuple[int, ...]
    validation: float = 0.3
    robust_share: tuple[float, ...] = (0.5,)
    epochs: int | None = None
    images: int = 1000
    attacks: tuple[str, ...] = ("pgd", "square")
    steps: int = 20
    restarts: int = 2
    queries: int = 300
    finals_of: str | None = None


@dataclass(frozen=True)
class Attack:
    """``[attack]``: `eps` is the strength of the score and of the hypotheses; the lists hold
    further ones. `images` test images are drawn at random; all are used for clean and FGSM. The
    draw is the same for all plans: `skip` leaves out its first ones, which earlier plans saw."""

    eps: float
    norm: str = "linf"
    worst: tuple[float, ...] = ()
    worst_l2: tuple[float, ...] = ()
    pgd: tuple[float, ...] = ()
    fgsm: tuple[float, ...] = ()
    transfer: tuple[float, ...] = ()
    images: int = 1000
    skip: int = 0
    steps: int = 100
    restarts: int = 2
    queries: int = 5000
    masking_images: int = 0
    condition_images: int = 0


@dataclass(frozen=True)
class Family:
    """``[[family]]``: a method with everything but the axes of its search; `start` places it on
    them, and `ranks` and `model` stand in place of the network's."""

    method: Method
    optimizer: str
    start: Mapping[str, float]
    ranks: Mapping[str, float] | None = None
    model: str | None = None

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def ours(self) -> bool:
        """Of CondLR and CondLRAdam with a bound."""
        return self.method.kind == "condlr" and self.method.tau is not None


@dataclass(frozen=True)
class Hypothesis:
    """``[[hypothesis]]``: one of `better` has a larger value in `column` than one of `than`, by
    more than `margin` points; of several families the one that validation scores best speaks.
    `eps`: the worst case at another strength than that of the score, one of `worst`."""

    text: str
    better: tuple[str, ...]
    than: tuple[str, ...]
    column: str = "worst"
    margin: float = 0.0
    eps: float | None = None


@dataclass(frozen=True)
class Plan:
    """A whole file. `adversarial`: all families and trials are trained on attacked images;
    `earlier`: the plan that the search's `finals_of` names."""

    name: str
    title: str
    seeds: tuple[int, ...]
    network: Network
    training: Mapping[str, Any]
    search: Search
    attack: Attack
    axes: Mapping[str, Axis]
    families: tuple[Family, ...]
    hypotheses: tuple[Hypothesis, ...]
    reference: str
    adversarial: Adversarial | None = None
    note: str = ""
    digest: str = ""
    earlier: Plan | None = None

    def family(self, name: str) -> Family:
        """By name."""
        return next(f for f in self.families if f.name == name)

    def axes_of(self, family: Family) -> dict[str, Axis]:
        """The axes of a family's search, in the order in which neighbours are tried."""
        return {name: self.axes[name] for name in (*COMMON, *OWN) if name in family.start}

    def made(
        self, family: Family, values: Mapping[str, float], seed: int, epochs: int | None
    ) -> tuple[Method, Settings]:
        """Method and training settings of one run."""
        own: dict[str, Any] = {k: v for k, v in values.items() if k in OWN}
        rest = {k: v for k, v in values.items() if k not in OWN}
        given = {**self.training, **rest, "seed": seed, "optimizer": family.optimizer}
        if epochs is not None:
            given["epochs"] = epochs
        if family.optimizer == "adam":
            given.pop("nesterov", None)
        return dataclasses.replace(family.method, **own), Settings(**given)


def load(path: Path) -> Plan:
    """Read a plan, or raise :class:`PlanError` that names what is wrong in it."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        plan = parse(raw, path.parent.name)
        return plan if plan.search.finals_of is None else _after(plan, path.parent.parent)
    except (OSError, tomllib.TOMLDecodeError, PlanError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{path}: {type(error).__name__}: {error}") from error


def parse(raw: Mapping[str, Any], name: str) -> Plan:
    """A plan from a mapping."""
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()[:12]
    given = {k: _frozen(v) for k, v in raw.items()}
    if derived := sorted({"name", "digest", "earlier"} & given.keys()):
        raise PlanError(f"unknown {derived}: the folder, the text and finals_of say that")
    axes = {key: _make(Axis, value) for key, value in given.pop("axes").items()}
    families = tuple(_family(entry, axes) for entry in given.pop("family"))
    hypotheses = tuple(_hypothesis(entry) for entry in given.pop("hypothesis", ()))
    if "adversarial" in given:
        given["adversarial"] = _make(Adversarial, given["adversarial"])
    plan = _make(
        Plan,
        {
            **given,
            "name": name,
            "digest": digest,
            "network": _make(Network, given["network"]),
            "search": _make(Search, given["search"]),
            "attack": _make(Attack, given["attack"]),
            "axes": axes,
            "families": families,
            "hypotheses": hypotheses,
        },
    )
    known = {f.name for f in families}
    wanted = {plan.reference, *(n for h in hypotheses for n in (*h.better, *h.than))}
    if len(known) < len(families) or not wanted <= known:
        raise PlanError(f"families must have different names, and be there: {sorted(wanted)}")
    _check_counts(plan)
    for hypothesis in hypotheses:
        eps, there = hypothesis.eps, plan.attack.worst if hypothesis.column == "worst" else ()
        if eps is not None and eps not in there:
            raise PlanError(f"eps of a hypothesis must be one of worst and not of clean, got {eps}")
    for family in families:
        plan.made(family, family.start, 0, None)  # all values are checked
    return plan


def _after(plan: Plan, plans: Path) -> Plan:
    """With the plan whose finals these are; all that its trials depend on must be the same."""
    path = plans / str(plan.search.finals_of) / "plan.toml"
    earlier = parse(tomllib.loads(path.read_text(encoding="utf-8")), path.parent.name)
    families = {family.name: family for family in earlier.families}
    one, other = (
        {
            "network": p.network,
            "training": p.training,
            "axes": p.axes,
            "adversarial": p.adversarial,
            "eps and norm of attack": (p.attack.eps, p.attack.norm),
        }
        for p in (plan, earlier)
    )
    different = [name for name in one if one[name] != other[name]]
    different += [f.name for f in plan.families if families.get(f.name) != f]
    if different:
        raise PlanError(f"finals_of {earlier.name}: not the same there: {', '.join(different)}")
    again = sorted({*plan.search.seeds} & {*earlier.search.seeds})
    finals = earlier.search.finals_of is not None
    if again or finals or plan.search.trials > earlier.search.trials:
        raise PlanError(
            f"finals_of {earlier.name}: must be a search of at least {plan.search.trials} trials "
            f"from other seeds and no finals, got {'finals of ' * finals}"
            f"{earlier.search.trials} trials and seeds {again} in both"
        )
    both = hashlib.sha256((plan.digest + earlier.digest).encode()).hexdigest()[:12]
    return dataclasses.replace(plan, earlier=earlier, digest=both)


def _family(entry: Mapping[str, Any], axes: Mapping[str, Axis]) -> Family:
    entry = dict(entry)
    start = dict(entry.pop("start"))
    optimizer = entry.pop("optimizer", "sgd")
    own = {key: entry.pop(key, None) for key in ("ranks", "model")}
    method = _make(Method, entry)
    if not {*COMMON} <= start.keys() <= {*COMMON, *OWN} or not start.keys() <= axes.keys():
        raise PlanError(f"{method.name}: start must name {COMMON}, maybe {OWN}, got {[*start]}")
    for name, value in start.items():
        rung = axes[name].value(value, 0)
        if rung is None or not math.isclose(rung, value, rel_tol=1e-5):
            raise PlanError(
                f"{method.name}: start must lie on the rungs of its axes, got {name} = {value!r}"
                + ("" if rung is None else f"; the nearest is {rung}")
            )
    return Family(method, optimizer, start, **own)


def _check_counts(plan: Plan) -> None:
    """What would otherwise show after hours, or as a row that counts twice."""
    asked, attack = plan.search, plan.attack
    lists = {"seeds": plan.seeds, "seeds of the search": asked.seeds, "share": asked.robust_share}
    for name, values in lists.items():
        if not values or len(set(values)) < len(values):
            raise PlanError(f"{name}: must be different ones, at least one, got {[*values]}")
    if asked.trials < 1 or attack.images < 1 or attack.skip < 0:
        raise PlanError(
            "trials and images must be at least 1 and skip at least 0, got "
            f"{asked.trials}, {attack.images} and {attack.skip}"
        )
    if attack.norm not in NORMS:
        raise PlanError(f"norm must be one of {NORMS}, got {attack.norm!r}")


def _hypothesis(entry: Mapping[str, Any]) -> Hypothesis:
    found = _make(Hypothesis, {k: _frozen(v) for k, v in entry.items()})
    if found.column not in COLUMNS:
        raise PlanError(f"column must be one of {COLUMNS}, got {found.column!r}")
    return found


def registered(path: Path) -> str | None:
    """The commit that holds the file as it is now; None if it was changed since, or never was."""
    clean = _git(path, "status", "--porcelain", "--", path.name)
    return (
        (_git(path, "log", "-1", "--format=%h", "--", path.name) or None) if clean == "" else None
    )


def _git(path: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=path.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _frozen(v) for k, v in value.items()}
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _make(cls: Any, values: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise PlanError(f"unknown {unknown} in {cls.__name__.lower()}, known: {sorted(known)}")
    return cls(**{k: _frozen(v) for k, v in values.items()})
