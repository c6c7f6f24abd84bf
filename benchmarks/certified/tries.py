"""Tries on CIFAR-10's validation split at 36/255, the most telling first; see ``probes.jsonl``.

Up to 500,000 stored numbers, and "larger" up to a million. A list that is cut off is still of use.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .plan import Run, larger_tree, longer_tree

# Networks of up to 500,000 numbers: potential layers or a second layer on every level, paid by
# the rank; wider levels of a lower rank.
FOLDS: dict[str, Any] = {"folds": (64,), "rank": 104}
FOLDS_TWICE: dict[str, Any] = {"folds": (32, 32), "rank": 108}
DEEP: dict[str, Any] = {"depth": 2, "rank": 80}
WIDER: dict[str, Any] = {"widths": (128, 320, 320, 320), "rank": 108}
# And of up to a million.
LARGER_FOLDS: dict[str, Any] = {"folds": (96,), "rank": 140}
LARGER_DEEP: dict[str, Any] = {"depth": 2, "widths": (160, 320, 320, 320), "rank": 128}

_SMALL: tuple[tuple[str, dict[str, Any]], ...] = (
    ("plain", {}),
    ("clip", {"clip": 1.0}),
    ("clip fast", {"clip": 1.0, "lr": 1.2e-2}),
    ("folds", {"clip": 1.0, **FOLDS}),
    ("deep", {"clip": 1.0, **DEEP}),
    ("larger", {"clip": 1.0, "larger": True}),
    ("larger folds", {"clip": 1.0, "larger": True, **LARGER_FOLDS}),
    ("larger deep", {"clip": 1.0, "larger": True, **LARGER_DEEP}),
    ("long", {"clip": 1.0, "epochs": 160}),
    ("eps 0.2", {"clip": 1.0, "eps_train": 0.2}),
    ("eps 0.3", {"clip": 1.0, "eps_train": 0.3}),
    ("batch 256", {"clip": 1.0, "batch": 256}),
    ("crop 4", {"clip": 1.0, "crop": 4}),
    ("slow head", {"clip": 1.0, "head_rate": 0.33, "lr": 9e-3}),
    ("beta2", {"clip": 1.0, "beta2": 0.99}),
    ("folds twice", {"clip": 1.0, **FOLDS_TWICE}),
    ("folds long", {"clip": 1.0, "epochs": 160, **FOLDS}),
    ("wider", {"clip": 1.0, **WIDER}),
    ("batch 1024", {"clip": 1.0, "batch": 1024, "lr": 9e-3}),
    ("tail", {"clip": 1.0, "tail": 0.3}),
    ("slow", {"clip": 1.0, "lr": 4e-3}),
    ("hot", {"clip": 1.0, "temperature": 2.0}),
    ("decay", {"clip": 1.0, "decay": 0.05}),
    ("ramp", {"clip": 1.0, "ramp": 0.3}),
    ("larger long", {"clip": 1.0, "epochs": 120, "larger": True}),
    ("smoke", {"clip": 1.0, "epochs": 2}),  # only where it is asked for
    ("cross entropy", {"clip": 1.0, "kind": "cross_entropy", "eps_train": 0.17}),
)


def _try(title: str, changes: dict[str, Any]) -> tuple[str, Run]:
    settings: dict[str, Any] = {"epochs": 40, "group": "tries", "choice": True, **changes}
    make = larger_tree if settings.pop("larger", False) else longer_tree
    return title, dataclasses.replace(make(0), note=title.replace(" ", "-"), **settings)


TRIES = tuple(_try(title, changes) for title, changes in _SMALL)
