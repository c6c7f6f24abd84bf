"""What is run on the GPU: groups of their own, as a table has rows of one kind of machine.

Batches of 250 or 500 divide the images, so that all steps have one size and one graph. Networks
and settings are those of ``plan.py`` except where a choice on validation images, in
``probes.jsonl`` or in the group itself, says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .plan import (
    MNIST,
    OTHER_SHAPES,
    Run,
    fashion,
    fashion_wide_radius,
    folds,
    larger_tree,
    long_run,
    longer_tree,
    peer,
    rivals,
)
from .tries import FOLDS, LARGER_FOLDS

# Up to 500,000 and up to a million numbers: chosen from the tries of ``tries.py``.
RECIPE: dict[str, Any] = {**FOLDS, "clip": 1.0, "batch": 500, "epochs": 150}
LARGER_RECIPE: dict[str, Any] = {**LARGER_FOLDS, "clip": 1.0, "batch": 500, "epochs": 150}
# Its step waits for the host (singular vectors), so that no graph can be captured: hours.
LEFT_OUT = "low rank tau 0.1"
# Fewer than asked for, where a run takes long.
SEEDS = {"mnist0.3-width-gpu": 3}
# Groups of plan.py that ask the same here.
TWINS = {
    "cifar36-longer": "cifar36-gpu", "cifar36-larger": "cifar36-larger-gpu",
    "mnist0.3-long": "mnist0.3-long-gpu", "mnist1.58": "mnist1.58-gpu",
    "fashion0.25": "fashion0.25-gpu", "fashion1.0": "fashion1.0-gpu", "mnist0.3": "mnist0.3-gpu",
    "mnist0.3-width": "mnist0.3-width-gpu",
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
    return longer_tree(seed, group="cifar36-gpu", **RECIPE)


def larger(seed: int) -> Run:
    """The same with up to a million."""
    return larger_tree(seed, group="cifar36-larger-gpu", **LARGER_RECIPE)


def peer_of(seed: int) -> Run:
    """LiResNet at the rate that the tries on the processor chose.

    Its steps cannot be captured, so that the host launches every product of theirs; in the minutes
    of `small` it makes far fewer steps. It gets more minutes, and batches of 500.
    """
    return replace(peer()[1], group="cifar36-gpu", batch=500, epochs=20, lr=1e-3, seed=seed)


def long(seed: int) -> Run:
    """MNIST at 0.3 as on the processor, but for the batch."""
    return replace(long_run(seed), group="mnist0.3-long-gpu", batch=250)


def wide_radius(seed: int) -> Run:
    """MNIST at 1.58 as on the processor, but for the batch."""
    return folds(seed, group="mnist1.58-gpu", batch=250)


def _methods(pairs: Iterator[Any], **changes: Any) -> Iterator[tuple[list[Run], Run]]:
    for tries, base in pairs:
        if base.method != LEFT_OUT:
            yield [replace(run, **changes) for run in tries], replace(base, **changes)


def mnist(epochs: int = 10) -> Iterator[tuple[list[Run], Run]]:
    """The methods on MNIST at 0.3, each with a choice of its own."""
    return _methods(rivals("mnist0.3-gpu", MNIST, epochs), batch=250)


def widths() -> Iterator[tuple[list[Run], Run]]:
    """At other sizes with the same choice."""
    for tries, base in mnist():
        for shapes in OTHER_SHAPES:
            if base.method in shapes:
                sizes, rank = shapes[base.method]
                yield tries, replace(base, group="mnist0.3-width-gpu", widths=sizes, rank=rank)


def blocks(seeds: int = 5) -> Iterator[tuple[str, list[Any]]]:
    """As :func:`plan.blocks`."""
    few = range(min(3, seeds))
    yield "cifar36-gpu", [make(seed) for seed in few for make in (small, larger)]
    yield "mnist0.3-long-gpu", [long(seed) for seed in range(seeds)]
    yield "mnist1.58-gpu", [wide_radius(seed) for seed in range(seeds)]
    yield "fashion0.25-gpu", list(fashion(group="fashion0.25-gpu", batch=250))
    yield "fashion1.0-gpu", [fashion_wide_radius(group="fashion1.0-gpu", batch=250)]
    yield "mnist0.3-gpu", list(mnist())
    yield "mnist0.3-width-gpu", list(widths())
    yield "cifar36-peer-gpu", [peer_of(seed) for seed in few]
    # an epoch each, to see that everything runs; in no table
    trial: dict[str, Any] = {"group": "trial-gpu", "epochs": 1}
    yield (
        "trial-gpu",
        [
            longer_tree(0, **{**RECIPE, **trial}),
            replace(peer_of(0), **trial),
        ],
    )
