"""A character-level transformer: dense AdamW against CondLRAdam at half the weights.

Two causal blocks of width 96 on 69 kB of the Python language reference (benchmarks/data). Both get
the same start, batches, cosine and number of steps, and the same small grid of rates. All linear
layers but the head are low-rank with cond <= 1.1. Goal: within 3 % of the dense validation loss.
About 6 minutes on one core.

    python -m benchmarks.transformer_adam [--steps 2000] [--rules]

``--rules`` compares one second moment a block with one a point instead, with the bound and
without.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import lrmanifold as lrm
from lrmanifold.optim import CondLRAdam, param_groups

from ._moments import moment_rule
from ._record import record
from .character_model import BATCH, CONTEXT, Transformer, load

RATES, TAU = (1e-3, 2e-3, 4e-3, 8e-3), 0.1


def train(
    lr: float,
    steps: int,
    *,
    tau: float | None,
    dense: bool,
    seed: int = 0,
    compression: float = 0.5,
) -> dict[str, Any]:
    """One run; returns final validation loss, the share of weights kept, the largest cond."""
    training, held, size = load()
    torch.manual_seed(seed)
    model: nn.Module = Transformer(size)
    full = sum(p.numel() for p in model.parameters())
    if not dense:
        lrm.factorize(model, compression=compression, tau=tau, exclude="head")
    groups = param_groups(model)
    optimizer = torch.optim.AdamW(groups, lr) if dense else CondLRAdam(groups, lr)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.01 if group.get("name") != "no_decay" else 0.0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / 50) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for _ in range(steps):
        at = torch.randint(len(training) - CONTEXT, (BATCH, 1), generator=generator)
        window = training[at + torch.arange(CONTEXT + 1)]
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        logits = model(held[:, :-1])
        value = F.cross_entropy(logits.flatten(0, 1), held[:, 1:].flatten())
    layers = [m for m in model.modules() if isinstance(m, lrm.nn.LowRankLayer)]
    conds = [float(layer.manifold.cond(layer.weight.detach()).max()) for layer in layers]
    return {
        "lr": lr,
        "loss": float(value),
        "weights_kept": sum(p.numel() for p in model.parameters()) / full,
        "cond": max(conds, default=None),
        "seconds": seconds,
    }


def main() -> None:
    """Run the grid, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rules", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []

    def run(method: str, lr: float, rule: str = "library", **how: Any) -> None:
        with moment_rule(rule):
            result = train(lr, options.steps, seed=options.seed, **how)
        rows.append({"method": method, **result})
        cond = "" if result["cond"] is None else f"{result['cond']:8.3f}"
        print(
            f"{method:34}{lr:8.0e}{result['loss']:9.4f}{result['weights_kept']:8.1%}"
            f"{cond:>9}{result['seconds']:7.1f} s",
            flush=True,
        )

    if options.rules:
        for tau in (TAU, None):
            for rule in ("block", "point"):
                for lr in RATES[2:]:
                    run(f"CondLRAdam {rule}, tau={tau}", lr, rule, tau=tau, dense=False)
        record("second_moments_transformer", rows)
        return
    for lr in RATES:
        run("dense AdamW", lr, tau=None, dense=True)
    for lr in RATES:
        run(f"CondLRAdam, tau={TAU}", lr, tau=TAU, dense=False)
    best: dict[str, float] = {}
    for row in rows:
        best[row["method"]] = min(row["loss"], best.get(row["method"], math.inf))
    for method, loss in best.items():
        print(f"{method}: {loss:.4f}, {loss / best['dense AdamW'] - 1:+.1%} against dense")
    record("transformer_adam", {"runs": rows, "best": best})


if __name__ == "__main__":
    main()
