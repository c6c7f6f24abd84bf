"""Learning rate and weight decay of each method of ``lrmanifold demo``, from a validation split.

``python -m benchmarks.demo_settings`` writes ``results/demo_settings.json``. What was chosen stands
in ``experiments/demo.py``, and a test compares the two. The test images are not used.

Every method has the same grid of rates and decays. A grid is extended where the best value lies at
its end, except at decay 0. The score is the mean of the clean accuracy and that under PGD with
linf radius 0.1 on a fifth of the training images, over two seeds that the demo does not use. A run
that diverges scores 0.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from lrmanifold import robustness
from lrmanifold.experiments.data import Dataset, load, validation_split
from lrmanifold.experiments.demo import EXCLUDE, Demo
from lrmanifold.experiments.methods import Method, comparison, train
from lrmanifold.experiments.models import build

from ._record import record

RATES, DECAYS = (0.0125, 0.025, 0.05, 0.1), (0.0, 0.003, 0.01)
SEEDS, EPS, LIMIT = (100, 101), 0.1, 1.6


def score(method: Method, lr: float, decay: float, data: Dataset, demo: Demo) -> float:
    """Mean of clean and attacked accuracy over the seeds, in [0, 1]."""
    total = 0.0
    for seed in SEEDS:
        settings = dataclasses.replace(demo.settings(method, seed), lr=lr, weight_decay=decay)
        network = functools.partial(build, "mlp", data)
        try:
            trained = train(method, network, data, demo.rank, settings, exclude=EXCLUDE)
        except FloatingPointError:
            return 0.0
        found = robustness.accuracy_under_attack(
            trained.model,
            (data.test_x, data.test_y),
            robustness.pgd,
            [0.0, EPS],
            generator=torch.Generator().manual_seed(seed),
        )
        total += sum(found.values()) / len(found)
    return total / len(SEEDS)


def search(method: Method, data: Dataset, demo: Demo) -> dict[str, Any]:
    """All scores of one method, and the best setting, inside its grid."""
    rates, decays, scores = list(RATES), list(DECAYS), {}
    while True:
        for lr in rates:
            for decay in decays:
                if (lr, decay) not in scores:
                    scores[lr, decay] = score(method, lr, decay, data, demo)
                    print(f"{method.name}: lr {lr:g} decay {decay:g}: {scores[lr, decay]:.4f}")
        best = max(scores, key=lambda pair: (scores[pair], -pair[0], pair[1]))
        if best[0] == rates[-1] and rates[-1] < LIMIT:
            rates.append(2 * rates[-1])
        elif best[0] == rates[0]:
            rates.insert(0, rates[0] / 2)
        elif best[1] == decays[-1]:
            decays.append(round(3 * decays[-1], 4))
        else:
            break
    tries = [{"lr": lr, "weight_decay": d, "score": s} for (lr, d), s in sorted(scores.items())]
    return {"lr": best[0], "weight_decay": best[1], "score": scores[best], "tries": tries}


def main() -> None:
    """Search for every trained method and write what was found."""
    demo = Demo()
    data = validation_split(load("digits"), 0.2, 0)
    trained = [method for method in comparison() if method.kind != "svd"]
    print(record("demo_settings", {m.name: search(m, data, demo) for m in trained}))


if __name__ == "__main__":
    main()
