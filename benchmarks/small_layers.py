"""From which width on a low-rank training step is faster than a dense one.

A network with two hidden layers, as in README: step, forward and backward pass of ``CondLR`` on
low-rank layers (τ = 0.1, momentum 0.9, weight decay) against ``torch.optim.SGD`` on dense ones.
Processor time of one thread, both in turn, the median of 25 rounds.

    OMP_NUM_THREADS=1 python -m benchmarks.small_layers
    OMP_NUM_THREADS=1 python -m benchmarks.small_layers AdamW  # README's case by CondLRAdam, AdamW
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import lrmanifold as lrm

from ._record import record

# width, rank, batch; the first one is README's
CASES = [
    (256, 32, 50),
    (256, 32, 512),
    (512, 64, 128),
    (1024, 64, 50),
    (1024, 64, 128),
    (2048, 64, 128),
]
ROUNDS = 25


def network(width: int) -> nn.Module:
    """64 inputs, 10 classes."""
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )


def measure(width: int, rank: int, batch: int, adam: bool = False) -> dict[str, Any]:
    """Milliseconds of both, and the ratio within a round; by CondLRAdam and AdamW if `adam`."""
    dense, low = network(width), lrm.factorize(network(width), rank=rank, tau=0.1, exclude="4")
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.01}
    usual: Any = torch.optim.AdamW
    ours: Any = lrm.optim.CondLRAdam
    if not adam:
        options["momentum"] = 0.9
        usual, ours = torch.optim.SGD, lrm.optim.CondLR
    pairs: list[tuple[nn.Module, Any]] = [
        (dense, usual(dense.parameters(), **options)),
        (low, ours(low.parameters(), **options)),
    ]
    x, y = torch.rand(batch, 64), torch.randint(10, (batch,))
    often = max(2, 5000 // width)
    times: list[list[float]] = [[], []]
    for k in range(ROUNDS + 1):
        for (model, optimizer), found in zip(pairs, times, strict=True):
            start = time.process_time()
            for _ in range(often):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            if k:  # the first round warms up
                found.append((time.process_time() - start) / often * 1e3)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return {
        "width": width,
        "rank": rank,
        "batch": batch,
        "dense_ms": statistics.median(times[0]),
        "low_rank_ms": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def main(optimizer: str = "SGD") -> None:
    """Measure, print, write."""
    torch.manual_seed(0)
    adam = optimizer == "AdamW"
    rows = [measure(*case, adam=adam) for case in (CASES[:1] if adam else CASES)]
    if adam:
        rows[0]["load"] = os.getloadavg()[0]  # processes that wanted a core, this one among them
    for row in rows:
        print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()})
    print(record("small_layers_adamw" if adam else "small_layers", rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
