"""Does the best rate transfer over width? CondLRMuon beside CondLRAdam at widths 64, 128, 256.

The model of `character_model`, all linear layers but the head of rank width/4 with
cond <= 1.1, few steps, warm-up and cosine. The rate of the low-rank weights is searched on a grid
of factors of 2; all other parameters keep 2e-3 in every run, as theirs is another question. The
loss is that of the validation part, by which the rates are compared and nothing else is chosen.
About 20 minutes on one core.

    python -m benchmarks.muon_width [--steps 300] [--widths 64 128 256] [--seeds 0]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import lrmanifold as lrm
from lrmanifold.optim import CondLRAdam, CondLRMuon, param_groups

from ._record import record
from .character_model import BATCH, CONTEXT, Transformer, load

TAU, SHARE, OTHERS = 0.1, 0.25, 2e-3
RULES: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "CondLRMuon": (CondLRMuon, tuple(0.005 * 2**k for k in range(7))),
    "CondLRAdam": (CondLRAdam, tuple(0.0005 * 2**k for k in range(7))),
}


def train(rule: str, lr: float, width: int, steps: int, seed: int) -> dict[str, Any]:
    """One run; the loss on the validation part at its end."""
    training, held, size = load()
    torch.manual_seed(seed)
    model = Transformer(size, width)
    lrm.factorize(model, rank=SHARE, tau=TAU, exclude="head", keep_larger=True)
    groups = param_groups(model)
    for group in groups:
        group["lr"] = lr if group["name"] == "manifold" else OTHERS
    optimizer = RULES[rule][0](groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / 30) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in range(steps):
        at = torch.randint(len(training) - CONTEXT, (BATCH, 1), generator=generator)
        window = training[at + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        value = F.cross_entropy(model(held[:, :-1]).flatten(0, 1), held[:, 1:].flatten())
    layers = [m for m in model.modules() if isinstance(m, lrm.nn.LowRankLayer)]
    return {
        "rule": rule,
        "width": width,
        "lr": lr,
        "seed": seed,
        "loss": float(value),
        "cond": max(float(x.manifold.cond(x.weight.detach()).max()) for x in layers),
        "seconds": seconds,
    }


def best_rates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each rule and width: the best rate by mean loss, and the rates within 2 % of its loss."""
    found = []
    for rule, width in sorted({(row["rule"], row["width"]) for row in rows}):
        losses: dict[float, list[float]] = {}
        for row in rows:
            if (row["rule"], row["width"]) == (rule, width):
                losses.setdefault(row["lr"], []).append(row["loss"])
        means = {lr: sum(values) / len(values) for lr, values in losses.items()}
        lr = min(means, key=lambda rate: means[rate])
        window = [rate for rate in sorted(means) if means[rate] <= 1.02 * means[lr]]
        found.append(
            {"rule": rule, "width": width, "lr": lr, "loss": means[lr], "within_2_percent": window}
        )
    return found


def main() -> None:
    """Run the grid, print a table, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in options.seeds:
        for width in options.widths:
            for rule, (_, rates) in RULES.items():
                for lr in rates:
                    row = train(rule, lr, width, options.steps, seed)
                    rows.append(row)
                    print(
                        f"{rule:12}{width:5}{lr:10.4g}{row['loss']:9.4f}{row['cond']:8.4f}"
                        f"{row['seconds']:7.1f} s",
                        flush=True,
                    )
            settings = {"steps": options.steps, "tau": TAU, "rank": SHARE, "lr of others": OTHERS}
            best = best_rates(rows)
            record("muon_width", {"settings": settings, "runs": rows, "best": best})
    for row in best_rates(rows):
        print(row)


if __name__ == "__main__":
    main()
