"""What was run on the GPU: groups of their own, as a table has rows of one kind of machine.

Batches of 250 or 500 divide the images, so that all steps have one size and one graph. Networks
and settings are those of ``plan.py`` but for what `TRIES` chose on validation images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .plan import Run, folds, larger_tree, longer_tree, peer

# Potential layers on every level, paid by the rank: up to 500,000 numbers, and up to a million.
FOLDS: dict[str, Any] = {"folds": (64,), "rank": 104}
LARGER_FOLDS: dict[str, Any] = {"folds": (96,), "rank": 140}
RECIPE: dict[str, Any] = {"clip": 1.0, "batch": 500, "epochs": 150}
# On CIFAR-10's validation images at 36/255; what came out is in ``probes.jsonl``.
TRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"clip": 1.0},
    "clip fast": {"clip": 1.0, "lr": 1.2e-2},
    "folds": {"clip": 1.0, **FOLDS},
}
# Groups of plan.py that ask the same here.
TWINS = {
    "cifar36-longer": "cifar36-gpu", "cifar36-larger": "cifar36-larger-gpu",
    "mnist1.58": "mnist1.58-gpu",
}  # fmt: skip


def preferred(group: str, counts: Mapping[tuple[str, str], int], methods: Iterable[str]) -> str:
    """The group to quote: the GPU's where it has as many runs of each of the methods.

    `counts` holds the number of runs on test images of a group and method.
    """
    twin = TWINS.get(group, group)
    shown = [m for m in methods if counts.get((group, m), 0) or counts.get((twin, m), 0)]
    enough = all(counts.get((twin, m), 0) >= max(1, counts.get((group, m), 0)) for m in shown)
    return twin if shown and enough else group


def small(seed: int) -> Run:
    """CIFAR-10 at 36/255 with up to 500,000 numbers."""
    return longer_tree(seed, group="cifar36-gpu", **RECIPE, **FOLDS)


def larger(seed: int) -> Run:
    """The same with up to a million."""
    return larger_tree(seed, group="cifar36-larger-gpu", **RECIPE, **LARGER_FOLDS)


def peer_of(seed: int) -> Run:
    """LiResNet at the rate that the tries on the processor chose.

    Its steps cannot be captured, so that the host launches every product of theirs; in the minutes
    of `small` it makes far fewer steps. It gets more minutes, and batches of 500.
    """
    return replace(peer()[1], group="cifar36-gpu", batch=500, epochs=20, lr=1e-3, seed=seed)


def blocks(seeds: int = 5) -> Iterator[tuple[str, list[Any]]]:
    """As :func:`plan.blocks`."""
    few = range(min(3, seeds))
    tried: dict[str, Any] = {"group": "tries", "epochs": 40, "choice": True}
    yield (
        "tries-gpu",
        [longer_tree(0, **tried, note=title.replace(" ", "-"), **changes)
         for title, changes in TRIES.items()],
    )  # fmt: skip
    yield "cifar36-gpu", [make(seed) for seed in few for make in (small, larger)]
    yield "mnist1.58-gpu", [folds(seed, group="mnist1.58-gpu", batch=250) for seed in range(seeds)]
    yield "cifar36-peer-gpu", [peer_of(seed) for seed in few]
