"""Tries on CIFAR-10's validation split at 36/255, the most telling first; see ``probes.jsonl``.

Up to 500,000 stored numbers, and "larger" up to a million. A list that is cut off is still of use.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from .plan import Run, larger_tree, longer_tree, peer

# Networks of up to 500,000 numbers: potential layers or a second layer on every level, paid by
# the rank; wider levels of a lower rank.
FOLDS: dict[str, Any] = {"folds": (64,), "rank": 104}
FOLDS_TWICE: dict[str, Any] = {"folds": (32, 32), "rank": 108}
DEEP: dict[str, Any] = {"depth": 2, "rank": 80}
WIDER: dict[str, Any] = {"widths": (128, 320, 320, 320), "rank": 108}
# And of up to a million.
LARGER_FOLDS: dict[str, Any] = {"folds": (96,), "rank": 140}
LARGER_DEEP: dict[str, Any] = {"depth": 2, "widths": (160, 320, 320, 320), "rank": 128}

# The second list, after potential layers on every level had won 1.1 points: where to put more of
# them. Batches of 500 divide the images, so no step has another size.
_SHORT: dict[str, Any] = {"clip": 1.0, "epochs": 24, "batch": 500}
FOLDED: dict[str, Any] = {"folds": (64,), "rank": 108}
FRONT: dict[str, Any] = {"levels": ((64,) * 4, (64,) * 2, (64,), (64,)), "rank": 88}
BACK: dict[str, Any] = {"levels": ((), (64,), (64,) * 2, (64,) * 3), "rank": 92}
TWICE: dict[str, Any] = {"folds": (64, 64), "rank": 84}
THRICE: dict[str, Any] = {"folds": (64,) * 3, "rank": 60}
FOUR: dict[str, Any] = {"folds": (32,) * 4, "rank": 92}
WIDE_FOLDED: dict[str, Any] = {"widths": (192, 320, 320, 320), "folds": (64,), "rank": 82}
LARGER_FOLDED: dict[str, Any] = {"larger": True, "folds": (96,), "rank": 142}
LARGER_TWICE: dict[str, Any] = {"larger": True, "folds": (96, 96), "rank": 108}
LARGER_THRICE: dict[str, Any] = {"larger": True, "folds": (96,) * 3, "rank": 70}
LARGER_FRONT: dict[str, Any] = {
    "larger": True, "levels": ((96,) * 4, (96,) * 2, (96,), (96,)), "rank": 114,
}  # fmt: skip
LARGER_WIDE: dict[str, Any] = {
    "larger": True, "widths": (256, 512, 512, 512), "folds": (96,), "rank": 104,
}  # fmt: skip

_SECOND: tuple[tuple[str, dict[str, Any]], ...] = (
    ("second front", FRONT),
    ("second twice", TWICE),
    ("second larger", LARGER_FOLDED),
    ("second larger twice", LARGER_TWICE),
    ("second folds", FOLDED),
    ("second peer", {"peer": True}),
    ("second crop 4", {"crop": 4, **FOLDED}),
    ("second eps 0.3", {"eps_train": 0.3, **FOLDED}),
    ("second larger front", LARGER_FRONT),
    ("second wide", WIDE_FOLDED),
    ("second long", {"epochs": 72, **FOLDED}),
    ("second batch 250", {"batch": 250, "lr": 4e-3, **FOLDED}),
    ("second back", BACK),
    ("second larger thrice", LARGER_THRICE),
    ("second fast", {"lr": 9e-3, **FOLDED}),
    ("second larger fast", {"lr": 9e-3, **LARGER_FOLDED}),
    ("second eps 0.2", {"eps_train": 0.2, **FOLDED}),
    ("second thrice", THRICE),
    ("second larger wide", LARGER_WIDE),
    ("second slow", {"lr": 4e-3, **FOLDED}),
    ("second larger eps 0.3", {"eps_train": 0.3, **LARGER_FOLDED}),
    ("second larger crop 4", {"crop": 4, **LARGER_FOLDED}),
    ("second larger long", {"epochs": 72, **LARGER_FOLDED}),
    ("second hot", {"temperature": 2.0, **FOLDED}),
    ("second four", FOUR),
    ("second head 1", {"head": 1.0, **FOLDED}),
    ("second tail", {"tail": 0.3, **FOLDED}),
    ("second beta2", {"beta2": 0.99, **FOLDED}),
    ("second decay", {"decay": 0.05, **FOLDED}),
)

# The first list; the first five lines of it are measured.
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
    note = title.replace(" ", "-")
    if settings.pop("peer", False):
        return title, dataclasses.replace(peer()[0][-1], group="tries", note=note)
    make = larger_tree if settings.pop("larger", False) else longer_tree
    return title, dataclasses.replace(make(0), note=note, **settings)


TRIES = tuple(
    _try(title, changes)
    for title, changes in (*((t, {**_SHORT, **c}) for t, c in _SECOND), *_SMALL)
)
