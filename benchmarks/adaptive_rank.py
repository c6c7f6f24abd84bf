"""Adaptive rank against fixed rank on LeNet5: hard-capped, penalised, fixed at the ranks found.

Every run spends the same number of mini-batches (each gradient evaluation, whatever it is for,
takes the next one). After the adaptive runs, CondLR with fixed ranks is trained at the ranks that
the capped runs found, so both have the same size.

    LRMANIFOLD_DATA=... python -m benchmarks.adaptive_rank --data mnist [--epochs 3] [--seed 0]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrmanifold as lrm
from lrmanifold.experiments import data, models
from lrmanifold.experiments.training import Normalized
from lrmanifold.robustness import accuracy_under_attack, fgsm, pgd

from ._record import record

START = 0.5  # ranks at the start, as a share of min(m, n)
BATCH, LR, MOMENTUM = 128, 0.1, 0.3
STRENGTHS = (0.0, 0.03, 0.06)
PGD_SAMPLES = 2000


class Budget:
    """A stream of mini-batches that knows how many were taken."""

    def __init__(self, dataset: data.Dataset, epochs: int, seed: int) -> None:
        self.total = epochs * math.ceil(len(dataset.train_y) / BATCH)
        self.taken = 0
        self._stream = self._forever(dataset, torch.Generator().manual_seed(seed))

    @staticmethod
    def _forever(
        dataset: data.Dataset, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from data.batches(dataset.train_x, dataset.train_y, BATCH, generator=generator)

    def __next__(self) -> tuple[Tensor, Tensor]:
        self.taken += 1
        return next(self._stream)

    @property
    def rate(self) -> float:
        """Cosine from LR to 0 over the budget."""
        return LR * 0.5 * (1.0 + math.cos(math.pi * min(1.0, self.taken / self.total)))


def layers(model: nn.Module) -> dict[str, lrm.nn.LowRankLayer]:
    """Low-rank layers by the last part of their names."""
    found = ((n.split(".")[-1], m) for n, m in model.named_modules())
    return {n: m for n, m in found if isinstance(m, lrm.nn.LowRankLayer)}


def run(
    dataset: data.Dataset,
    budget: Budget,
    seed: int,
    *,
    rank: Any,
    tau: float | None,
    make: Callable[[nn.Module], tuple[torch.optim.Optimizer, Callable[[Callable], Any]]],
) -> tuple[nn.Module, float]:
    """Train one network until the budget is spent; returns it and the largest cond seen."""
    torch.manual_seed(seed)
    network = models.build("lenet5", dataset)
    lrm.factorize(
        network,
        rank=rank,
        tau=tau,
        exclude="fc2",
        gradient="probe" if tau is None else "factors",
        keep_larger=True,
    )
    model = Normalized(network, dataset)
    optimizer, advance = make(model)

    def closure() -> Tensor:
        x, y = next(budget)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    worst = 1.0
    while budget.taken < budget.total:
        for group in optimizer.param_groups:
            group["lr"] = budget.rate
        advance(closure)
        conds = [float(m.manifold.cond(m.weight.detach()).max()) for m in layers(model).values()]
        worst = max(worst, *conds)
    return model, worst


def dlrt(recipe: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable:
    """Advance by a multi-pass recipe."""

    def make(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable]:
        optimizer = recipe(model.parameters(), LR, **options)
        return optimizer, optimizer.step

    return make


def condlr(**scheduler: Any) -> Callable:
    """Advance by CondLR, with a rank scheduler if there are options for one."""

    def make(model: nn.Module) -> tuple[torch.optim.Optimizer, Callable]:
        optimizer = lrm.optim.CondLR(model.parameters(), LR, momentum=MOMENTUM)
        ranks = lrm.optim.RankScheduler(model, optimizer, **scheduler) if scheduler else None

        def advance(closure: Callable) -> None:
            closure()
            optimizer.step()
            if ranks is not None:
                ranks.step(closure)

        return optimizer, advance

    return make


def main() -> None:
    """Run all, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist", choices=("mnist", "fashion-mnist"))
    parser.add_argument("--root", default=None)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tol", type=float, default=0.1)
    parser.add_argument("--beta", type=float, default=0.05)
    options = parser.parse_args()
    dataset = data.load(options.data, options.root)
    size = sum(p.numel() for p in models.build("lenet5", dataset).parameters())
    test = (dataset.test_x, dataset.test_y)
    few = (dataset.test_x[:PGD_SAMPLES], dataset.test_y[:PGD_SAMPLES])
    schedule = {"tol": options.tol, "every": 50, "augment": 8, "coefficient_steps": 10}
    rows: list[dict[str, Any]] = []

    def evaluate(name: str, *, rank: Any, tau: float | None, make: Callable) -> dict[str, int]:
        begin = time.perf_counter()
        budget = Budget(dataset, options.epochs, options.seed)
        model, worst = run(dataset, budget, options.seed, rank=rank, tau=tau, make=make)
        seconds = time.perf_counter() - begin
        ranks = {n: m.rank for n, m in layers(model).items()}
        row = {
            "method": name,
            "ranks": ranks,
            "kept": sum(p.numel() for p in model.parameters()) / size,
            "largest_cond": worst,
            "fgsm": accuracy_under_attack(model, test, fgsm, STRENGTHS),
            "pgd": accuracy_under_attack(model, few, pgd, STRENGTHS[1:], steps=20),
            "seconds": seconds,
        }
        rows.append(row)
        values = [*row["fgsm"].values(), *row["pgd"].values()]  # type: ignore[attr-defined]
        print(
            f"{name:34} {'/'.join(map(str, ranks.values())):12} {row['kept']:6.1%} {worst:9.2f} "
            + " ".join(f"{100 * a:6.2f}" for a in values)
            + f"  {seconds:5.0f} s",
            flush=True,
        )
        return ranks

    print(
        f"{'method':34} {'ranks':12} {'kept':>6} {'max cond':>9} clean, FGSM .03 .06, PGD .03 .06"
    )
    recipe = dlrt(lrm.optim.capped_dlrt, tol=options.tol)
    found = evaluate("capped_dlrt tau=.5", rank=START, tau=0.5, make=recipe)
    penalised = dlrt(lrm.optim.robust_dlrt, tol=options.tol, beta=options.beta)
    evaluate(f"robust_dlrt beta={options.beta:g}", rank=START, tau=None, make=penalised)
    scheduled = evaluate(
        "CondLR tau=.5 + RankScheduler", rank=START, tau=0.5, make=condlr(**schedule)
    )
    for label, ranks in (("capped_dlrt's", found), ("the scheduler's", scheduled)):
        evaluate(f"CondLR tau=.5 fixed at {label}", rank=ranks, tau=0.5, make=condlr())
    settings = {**vars(options), "lr": LR, "momentum": MOMENTUM, "batch": BATCH, "start": START}
    settings["pgd"] = f"20 steps, first {PGD_SAMPLES} test images"
    settings.pop("root")
    print(record(f"adaptive_rank_{options.data}", {"settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
