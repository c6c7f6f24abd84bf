"""What is to be run, read from a TOML file: data, model, methods, ranks, seeds, attacks.

A file has the fields of :class:`Training` at its top level, the tables ``[tuning]``, ``[attacks]``
and ``[ranks.NAME]``, and a list ``[[method]]`` with the fields of :class:`Method`. A method may
override any field of :class:`Training`, and ``sweep = {tau = [0.0, 0.1]}`` (several lists: all
combinations) makes a curve of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = (
    "dense",
    "svd",
    "factors",
    "spectral_norm",
    "orthogonal",
    "condlr",
    "dlrt",
    "robust_dlrt",
    "capped_dlrt",
)
MULTI_PASS = ("dlrt", "robust_dlrt", "capped_dlrt")


class ConfigError(ValueError):
    """An experiment's file asks for something that does not exist."""


@dataclass(frozen=True)
class Training:
    """How every method of an experiment is trained.

    Attributes
    ----------
    data, model : str
    epochs, batch_size : int
        Every method sees the same number of mini-batches: methods with several gradient
        evaluations a step take fewer steps.
    momentum : float
        Of SGD and CondLR.
    weight_decay, label_smoothing : float
    augment : {"none", "crop-flip"}
    noise : float
        Standard deviation of Gaussian noise that is added to the training images (in 0..1).
    samples : int or None
        Only the first so many training images (after a fixed shuffle).
    exclude : tuple of str
        Layers that stay dense, for every method.
    """

    data: str = "digits"
    model: str = "mlp"
    epochs: int = 5
    batch_size: int = 128
    momentum: float = 0.3
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    augment: str = "none"
    noise: float = 0.0
    samples: int | None = None
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One rival.

    Attributes
    ----------
    name : str
        For tables and curves; a sweep's members share it.
    kind : str
        One of :data:`KINDS`.
    optimizer : {"sgd", "adam"}
        SGD and CondLR, or AdamW and CondLRAdam.
    rank : str or None
        Name of a ``[ranks.NAME]`` table (patterns to ranks or shares).
    tau : float or None
    penalty : float
        β of R(S).
    orthogonality : float
        Weight of soft orthogonality, for "factors".
    tol : float or None
        Truncation tolerance of the adaptive kinds.
    s_steps : int
    lr : float or None
        None: tuned. A number is used as it is, and the row says that it was not tuned.
    """

    name: str
    kind: str
    optimizer: str = "sgd"
    rank: str | None = None
    tau: float | None = None
    penalty: float = 0.0
    orthogonality: float = 0.0
    tol: float | None = None
    s_steps: int = 1
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"{self.name}: kind must be one of {KINDS}, got {self.kind!r}")
        if self.optimizer not in ("sgd", "adam"):
            raise ConfigError(
                f"{self.name}: optimizer must be 'sgd' or 'adam', got {self.optimizer!r}"
            )
        if self.kind not in ("dense", "spectral_norm", "orthogonal") and self.rank is None:
            raise ConfigError(f"{self.name}: kind {self.kind!r} needs a rank")


@dataclass(frozen=True)
class Tuning:
    """The budget for the rate, the same for every method: so many rates, one short run each.

    `dlrt` is the grid of the multi-pass kinds, which have no momentum and take fewer steps. The
    score is the mean of clean and FGSM accuracy (at `strength`) on held-out training images.
    """

    sgd: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.4)
    adam: tuple[float, ...] = (0.0005, 0.001, 0.002, 0.004, 0.008)
    dlrt: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8, 1.6)
    epochs: int = 1
    samples: int | None = 20000
    validation: float = 0.1
    strength: float = 0.06
    seed: int = 1000

    def __post_init__(self) -> None:
        counts = [len(rates) for rates in (self.sgd, self.adam, self.dlrt)]
        if len(set(counts)) > 1:
            raise ConfigError(f"tuning: the same budget for all, got grids of {counts} rates")

    def rates(self, method: Method) -> tuple[float, ...]:
        """The grid for a method."""
        if method.kind in MULTI_PASS:
            return self.dlrt
        return self.adam if method.optimizer == "adam" else self.sgd


@dataclass(frozen=True)
class Attacks:
    """Strengths and sizes; an empty list leaves an attack out. `images` are the first of the test.

    FGSM uses all test images. `once` (masking checks, foolbox, condition numbers) is done for the
    first seed only.
    """

    fgsm: tuple[float, ...] = (0.01, 0.02, 0.03, 0.04, 0.06, 0.1)
    fgsm_unclipped: tuple[float, ...] = ()
    fgsm_l2: tuple[float, ...] = ()
    pgd: tuple[float, ...] = (0.03, 0.06, 0.1)
    pgd_l2: tuple[float, ...] = (0.5, 1.0, 1.5)
    transfer: tuple[float, ...] = (0.06, 0.1)
    steps: int = 20
    restarts: int = 2
    images: int = 1000
    masking: float = 0.06
    masking_images: int = 200
    foolbox_images: int = 0
    boundary_steps: int = 500
    condition_images: int = 100


@dataclass(frozen=True)
class Run:
    """One training with one seed; `key` names its folder, the same for equal settings."""

    experiment: str
    training: Training
    method: Method
    ranks: Mapping[str, float] | None
    seed: int
    tuning: Tuning
    attacks: Attacks
    first: bool = True
    reference: Run | None = None

    def settings(self) -> dict[str, Any]:
        """Everything that the trained weights depend on, the rate apart if it is tuned."""
        method = dataclasses.asdict(self.method)
        method.pop("name"), method.pop("rank")
        found: dict[str, Any] = {"training": dataclasses.asdict(self.training), "method": method}
        found |= {"ranks": dict(self.ranks) if self.ranks else None, "seed": self.seed}
        if self.method.lr is None:
            found["tuning"] = dataclasses.asdict(self.tuning)
        return found

    @property
    def key(self) -> str:
        """Short and readable; equal settings have equal keys."""
        return f"{self.training.data}-{self.method.kind}-{digest(self.settings())}"

    @property
    def row_key(self) -> str:
        """Of the line in the table: the training, its names, and what is measured."""
        asked = [dataclasses.asdict(self.attacks), self.first, self.experiment, self.method.name]
        return f"{self.key}-{digest(asked)}"


def digest(value: Any) -> str:
    """Ten hexadecimal digits of a JSON value."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Experiment:
    """A file's contents; :meth:`runs` lists what to do."""

    name: str
    title: str
    training: Training
    tuning: Tuning
    attacks: Attacks
    ranks: Mapping[str, Mapping[str, float]]
    methods: tuple[tuple[Method, Training, tuple[int, ...]], ...]
    reference: str | None = None
    note: str = ""
    seeds: tuple[int, ...] = field(default=(0,))

    def runs(self) -> Iterator[Run]:
        """All runs: seed by seed, so that a table cut short compares all methods."""
        seeds = sorted({seed for _, _, own in self.methods for seed in own})
        for seed in seeds:
            for method, training, own in self.methods:
                if seed in own:
                    yield self._run(method, training, seed, first=seed == own[0])

    def _run(self, method: Method, training: Training, seed: int, *, first: bool) -> Run:
        ranks = None if method.rank is None else self.ranks[method.rank]
        options = (method, ranks, seed, self.tuning, self.attacks)
        run = Run(self.name, training, *options, first=first)
        if self.reference is None or method.name == self.reference:
            return run
        other, its_training, its_seeds = next(
            entry for entry in self.methods if entry[0].name == self.reference
        )
        if seed not in its_seeds:
            return run
        reference = self._run(other, its_training, seed, first=False)
        return dataclasses.replace(run, reference=reference)


def load(path: str | Path) -> Experiment:
    """Read a file, or raise :class:`ConfigError` that names what is wrong in it."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        return parse(raw, path.stem)
    except (ConfigError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(raw: Mapping[str, Any], name: str) -> Experiment:
    """An experiment from a mapping."""
    raw = dict(raw)
    methods_raw, ranks = raw.pop("method", []), raw.pop("ranks", {})
    tuning = _make(Tuning, raw.pop("tuning", {}))
    attacks = _make(Attacks, raw.pop("attacks", {}))
    own = {k: raw.pop(k) for k in ("title", "reference", "note", "seeds") if k in raw}
    seeds = tuple(own.pop("seeds", (0,)))
    training = _make(Training, raw)
    methods = []
    for entry in methods_raw:
        for values in _combinations(entry):
            its_seeds = tuple(values.pop("seeds", seeds))
            keys = {f.name for f in dataclasses.fields(Training)}
            change = {k: _frozen(values.pop(k)) for k in list(values) if k in keys}
            method = _make(Method, values)
            if method.rank is not None and method.rank not in ranks:
                raise ConfigError(f"{method.name}: no table [ranks.{method.rank}]")
            methods.append((method, dataclasses.replace(training, **change), its_seeds))
    if not methods:
        raise ConfigError("needs at least one [[method]]")
    reference = own.get("reference")
    if reference is not None and reference not in {m.name for m, _, _ in methods}:
        raise ConfigError(f"reference must be the name of a method, got {reference!r}")
    return Experiment(
        name=name,
        title=own.get("title", name),
        training=training,
        tuning=tuning,
        attacks=attacks,
        ranks=ranks,
        methods=tuple(methods),
        reference=reference,
        note=own.get("note", ""),
        seeds=seeds,
    )


def _combinations(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    sweep = entry.get("sweep", {})
    rest = {k: v for k, v in entry.items() if k != "sweep"}
    for values in itertools.product(*sweep.values()):
        yield rest | dict(zip(sweep, values, strict=True))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _make(cls: Any, values: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"unknown {unknown} in {cls.__name__.lower()}, known: {sorted(known)}")
    return cls(**{k: _frozen(v) for k, v in values.items()})
