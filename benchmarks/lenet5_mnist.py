"""LeNet5 on MNIST: clean accuracy and FGSM for dense, plain low rank and CondLR, one seed.

The same start, batches, schedule (cosine from 0.1 to 0, momentum 0.3, 5 epochs, batch 128) for
every method; ranks 4/10/100 ("small") and 10/25/250 ("large") for conv1/conv2/fc1, the last layer
dense.

    LRMANIFOLD_DATA=... python -m benchmarks.lenet5_mnist [--data mnist] [--seed 0] [--epochs 5]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from torch import nn

from lrmanifold.experiments import data, models
from lrmanifold.experiments.methods import Method, comparison, train
from lrmanifold.experiments.training import Settings
from lrmanifold.robustness import accuracy_under_attack, fgsm

from ._record import record

RANKS = {
    "small": {"conv1": 4, "conv2": 10, "fc1": 100},
    "large": {"conv1": 10, "conv2": 25, "fc1": 250},
}
STRENGTHS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06)


def main() -> None:
    """Train all, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=("mnist", "fashion-mnist"))
    parser.add_argument("--root", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    dataset = data.load(options.data, options.root)
    settings = Settings(epochs=options.epochs, lr=0.1, momentum=0.3, seed=options.seed)

    def build() -> nn.Module:
        return models.build("lenet5", dataset)

    rows: list[dict[str, Any]] = []
    used = {"data": options.data, **vars(settings), "ranks": RANKS}
    name = f"lenet5_{options.data}_seed{options.seed}"
    dense = None
    print(
        f"{'ranks':6} {'method':24} {'kept':>6} {'cond':>6} "
        + " ".join(f"{s:6}" for s in STRENGTHS)
    )
    for size, ranks in RANKS.items():
        for method in [*comparison(), Method("fixed rank, no bound", "condlr", None)]:
            if method.kind == "dense" and dense is not None:
                continue
            begin = time.perf_counter()
            trained = train(
                method,
                lambda: models.build("lenet5", dataset),
                dataset,
                ranks,
                settings,
                dense=dense,
            )
            if method.kind == "dense":
                dense = trained
            seconds = time.perf_counter() - begin
            test = (dataset.test_x, dataset.test_y)
            accuracy = accuracy_under_attack(trained.model, test, fgsm, STRENGTHS)
            rows.append(
                {
                    "ranks": size,
                    "method": method.name,
                    "kept": trained.weights_kept,
                    "cond": trained.history.cond[-1] if trained.history.cond else None,
                    "accuracy": accuracy,
                    "loss": trained.history.loss,
                    "seconds": seconds,
                }
            )
            cond = f"{rows[-1]['cond']:6.2f}" if rows[-1]["cond"] else "     -"
            values = " ".join(f"{100 * a:6.2f}" for a in accuracy.values())
            print(
                f"{size:6} {method.name:24} {trained.weights_kept:6.1%} {cond} {values}", flush=True
            )
            # After every row: a run that is cut short keeps what it has measured.
            path = record(name, {"settings": used, "rows": rows})
    print(path)


if __name__ == "__main__":
    main()
