"""What is run on the GPU: groups of their own, as a table has rows of one kind of machine.

Batches of 250 or 500 divide the images, so that all steps have one size and one graph. Networks
and settings are those of ``plan.py`` except where a choice on validation images, in
``probes.jsonl`` or in the group itself, says otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .plan import (
    MNIST,
    MOVED,
    OTHER_SHAPES,
    RATES,
    Run,
    elsewhere,
    folds,
    larger_tree,
    long_run,
    longer_tree,
    peer,
    rivals,
)

# Up to 500,000 and up to a million numbers: chosen from the tries of ``tries.py``.
RECIPE: dict[str, Any] = {"folds": (64,), "rank": 108, "clip": 1.0, "batch": 500, "epochs": 160}
LARGER_RECIPE: dict[str, Any] = {
    "folds": (96,), "rank": 142, "clip": 1.0, "batch": 500, "epochs": 140,
}  # fmt: skip
PEER_EPOCHS = 40  # about as long as RECIPE on the GPU
# Its step waits for the host (singular vectors), so no graph can be captured: hours, not minutes.
LEFT_OUT = "low rank tau 0.1"
# Fewer than asked for, where a run takes long.
SEEDS = {"cifar36-gpu": 3, "cifar36-larger-gpu": 3, "cifar36-peer-gpu": 3, "mnist0.3-width-gpu": 3}


def small(seed: int) -> Run:
    """CIFAR-10 at 36/255 with up to 500,000 numbers."""
    return longer_tree(seed, group="cifar36-gpu", **RECIPE)


def larger(seed: int) -> Run:
    """The same with up to a million."""
    return larger_tree(seed, group="cifar36-larger-gpu", **LARGER_RECIPE)


def _noted(run: Run) -> Run:
    return replace(run, note=f"eps{run.eps_train:.3g}-ramp{run.ramp:g}-clip{run.clip:g}")


def peer_of(group: str) -> tuple[list[Run], Run]:
    """LiResNet for as many minutes: rate, radius trained for, its growth and cut from tries."""
    base = replace(peer()[1], group=group, batch=250, epochs=PEER_EPOCHS)
    short = replace(base, epochs=5, choice=True)
    tries = [
        replace(short, lr=lr, eps_train=eps, clip=1.0)
        for lr, eps in itertools.product((1e-3, 3e-3), (40 / 255, 0.25))
    ]
    tries += [replace(short, lr=1e-3), replace(short, lr=1e-3, ramp=0.03, clip=1.0)]
    return [_noted(run) for run in tries], base


def long(seed: int) -> Run:
    """MNIST at 0.3 as on the processor, but for the batch."""
    return replace(long_run(seed), group="mnist0.3-long-gpu", batch=250)


def wide_radius() -> tuple[list[Run], Run]:
    """MNIST at 1.58 as on the processor for twice the epochs; how images are moved is chosen."""
    base = folds(0, group="mnist1.58-gpu", batch=250, epochs=40)
    short = replace(base, epochs=16, choice=True)
    moves: list[dict[str, Any]] = [{}, {"shift": 1.0}, MOVED]
    tries = [replace(short, note=f"moves{i}", **move) for i, move in enumerate(moves)]
    return [*tries, replace(short, note="eps2.6", eps_train=2.6)], base


def _methods(pairs: Iterator[Any], **changes: Any) -> Iterator[tuple[list[Run], Run]]:
    for tries, base in pairs:
        if base.method != LEFT_OUT:
            yield [replace(run, **changes) for run in tries], replace(base, **changes)


def mnist(epochs: int = 20) -> Iterator[tuple[list[Run], Run]]:
    """The methods on MNIST at 0.3, each with a choice of its own."""
    return _methods(rivals("mnist0.3-gpu", MNIST, epochs), batch=250)


def widths() -> Iterator[tuple[list[Run], Run]]:
    """At other sizes with the same choice."""
    for tries, base in mnist():
        for shapes in OTHER_SHAPES:
            if base.method in shapes:
                sizes, rank = shapes[base.method]
                yield tries, replace(base, group="mnist0.3-width-gpu", widths=sizes, rank=rank)


def fashion() -> Iterator[tuple[list[Run], Run]]:
    """Fashion-MNIST at 0.25: rate and head of each method chosen on its own validation images."""
    for _, plain in elsewhere():
        base = replace(plain, group="fashion0.25-gpu", batch=250, epochs=20)
        short = replace(base, epochs=10, choice=True)
        grid = itertools.product(RATES[base.method], (1.0, 8.0))
        yield [replace(short, lr=lr, head=head) for lr, head in grid], base


def fashion_wide_radius() -> tuple[list[Run], Run]:
    """Fashion-MNIST at 1.0: rate and radius trained for chosen on its own validation images."""
    base = folds(0, group="fashion1.0-gpu", data="fashion-mnist", eps=1.0, batch=250, epochs=30)
    short = replace(base, epochs=8, choice=True)
    grid = itertools.product((7.5e-3, 1.5e-2), (1.2, 1.6))
    return [_noted(replace(short, lr=lr, eps_train=eps)) for lr, eps in grid], base


def blocks(seeds: int = 5) -> Iterator[tuple[str, list[Any]]]:
    """As :func:`plan.blocks`."""
    few = range(min(3, seeds))
    yield "cifar36-gpu", [small(seed) for seed in few]
    yield "cifar36-larger-gpu", [larger(seed) for seed in few]
    yield "cifar36-peer-gpu", [peer_of("cifar36-gpu")]
    yield "mnist0.3-long-gpu", [long(seed) for seed in range(seeds)]
    yield "mnist1.58-gpu", [wide_radius()]
    yield "fashion0.25-gpu", list(fashion())
    yield "fashion1.0-gpu", [fashion_wide_radius()]
    yield "mnist0.3-gpu", list(mnist())
    yield "mnist0.3-width-gpu", list(widths())
    # an epoch each, to see that everything runs; in no table
    trial: dict[str, Any] = {"group": "trial-gpu", "epochs": 1}
    yield (
        "trial-gpu",
        [
            longer_tree(0, **{**RECIPE, **trial}),
            replace(peer()[1], batch=250, lr=1e-3, **trial),
        ],
    )
