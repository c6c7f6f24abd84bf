"""Rows of the table, put together: the seeds of one method with one setting are a group."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = dict[str, Any]

ATTACKS = {
    "fgsm": "FGSM",
    "fgsm_unclipped": "FGSM unclipped",
    "fgsm_l2": "FGSM ℓ2",
    "pgd": "PGD",
    "pgd_l2": "PGD ℓ2",
    "transfer": "transfer",
}
_FAMILIES = {
    ("dense", "sgd"): "dense SGD",
    ("dense", "adam"): "dense AdamW",
    ("svd", "sgd"): "dense, SVD-truncated",
    ("factors", "sgd"): "A Bᵀ (SGD)",
    ("factors", "adam"): "A Bᵀ (AdamW)",
    ("condlr", "sgd"): "CondLR",
    ("condlr", "adam"): "CondLRAdam",
}


@dataclass
class Group:
    """Runs that differ in their seed alone."""

    experiment: str
    name: str
    rows: list[Row] = field(default_factory=list)
    label: str = ""

    @property
    def head(self) -> Row:
        """The row of the first seed, which has all measures."""
        return next((row for row in self.rows if row.get("first")), self.rows[0])

    @property
    def seeds(self) -> list[int]:
        """In increasing order."""
        return sorted(row["seed"] for row in self.rows)

    @property
    def family(self) -> str:
        """Methods of one kind have one curve in the frontier, and one colour."""
        method = self.head["method"]
        plain = not (method["orthogonality"] or method["penalty"])
        known = _FAMILIES.get((method["kind"], method["optimizer"])) if plain else None
        extra = [" + label smoothing"] if self.head["training"]["label_smoothing"] else []
        extra += [" + noise"] if self.head["training"]["noise"] else []
        return (known or self.name.split(" β")[0].split(" τ")[0]) + "".join(extra)

    def values(self, *path: str) -> np.ndarray:
        """A number of every run, seed by seed; runs without it are left out."""
        found = []
        for row in sorted(self.rows, key=lambda row: row["seed"]):
            value: Any = row
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, (int, float)) and math.isfinite(value):
                found.append(float(value))
        return np.array(found)

    def by_seed(self, *path: str) -> dict[int, float]:
        """The same by seed."""
        found = {}
        for row in self.rows:
            one = Group(self.experiment, self.name, [row]).values(*path)
            if len(one):
                found[row["seed"]] = float(one[0])
        return found

    def mean(self, *path: str) -> float | None:
        """Mean over the seeds."""
        found = self.values(*path)
        return float(found.mean()) if len(found) else None

    def spread(self, *path: str) -> float:
        """Standard deviation over the seeds; 0 for one."""
        found = self.values(*path)
        return float(found.std(ddof=1)) if len(found) > 1 else 0.0

    def curve(self, attack: str) -> dict[float, list[float]]:
        """Strength to the accuracies of all seeds, clean first."""
        found = {0.0: list(self.values("clean", "accuracy"))}
        for strength in self.head.get(attack, {}):
            found[float(strength)] = list(self.values(attack, strength))
        return {eps: runs for eps, runs in found.items() if runs}


def gather(rows: Iterable[Row]) -> dict[str, list[Group]]:
    """Groups by experiment, in the order of the table; failed runs are left out."""
    found: dict[str, dict[str, Group]] = {}
    for row in rows:
        if "failed" in row:
            continue
        method = {k: v for k, v in row["method"].items() if k != "lr" or v is not None}
        identity = json.dumps([method, row["training"]], sort_keys=True)
        groups = found.setdefault(row["experiment"], {})
        group = groups.setdefault(identity, Group(row["experiment"], row["name"]))
        # measured again with other attacks: the last counts
        group.rows = [other for other in group.rows if other["seed"] != row["seed"]] + [row]
    result = {name: list(groups.values()) for name, groups in found.items()}
    for found_groups in result.values():
        _label(found_groups)
    return result


def _label(groups: Sequence[Group]) -> None:
    """The name alone where it is unique, else with the settings that differ."""
    for name in {g.name for g in groups}:
        same = [g for g in groups if g.name == name]
        for group in same:
            group.label = name
        if len(same) < 2:
            continue
        settings = [{**g.head["training"], **g.head["method"]} for g in same]
        for group, own in zip(same, settings, strict=True):
            varied = [k for k in own if len({json.dumps(s[k]) for s in settings}) > 1]
            parts = [f"{_SHORT.get(k, k)} {_word(own[k])}" for k in varied]
            group.label = ", ".join([name, *parts])


_SHORT = {"tau": "τ", "label_smoothing": "smoothing", "weight_decay": "decay", "penalty": "β"}


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def failures(rows: Iterable[Row]) -> list[Row]:
    """Runs that diverged."""
    return [row for row in rows if "failed" in row]


def validated(groups: Sequence[Group], accept: Callable[[Group], bool]) -> Group | None:
    """The group with the best score on the validation split: chosen without the test images."""

    def score(group: Group) -> float:
        return max(group.head["tuning"].get("scores", {"": -1.0}).values())

    return max(filter(accept, groups), key=score, default=None)
