"""Drift off the manifold over 100,000 steps in float32: max |UᵀU - I|, |VᵀV - I|, and cond.

A small layer learns a noisy linear map with momentum 0.9, from a fresh batch at every step. The
largest drift of each stretch between two looks is that of its last 16 steps.

    python -m benchmarks.speed.drift [--device cuda] [--quick] [--output DIR]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrmanifold.nn import LowRankLinear
from lrmanifold.optim import CondLR

from . import _peers
from ._plot import Panel
from ._run import Report, Settings, main

SIZE, RANK, BATCH, NOISE = (48, 32), 4, 16, 0.5
RATES = (0.3, 0.03, 0.003)
LOOK = 16


def looks(steps: int) -> list[int]:
    """About four steps a decade at which to look, the last one included."""
    found = {round(10 ** (k / 4)) for k in range(4, 40)}
    return sorted({k for k in found if LOOK < k < steps} | {steps})


def run(
    lr: float, steps: int, device: torch.device, options: dict[str, Any]
) -> list[tuple[int, float, float]]:
    """Steps made, largest drift and largest condition number since the last look."""
    torch.manual_seed(0)
    m, n = SIZE
    target = torch.randn(m, n, device=device) / n**0.5
    layer = LowRankLinear(n, m, RANK, bias=False, tau=_peers.TAU, device=device)
    optimizer = CondLR(layer.parameters(), lr, momentum=0.9, **options)
    found: list[tuple[int, float, float]] = []
    moments = looks(steps)
    near = {k - i for k in moments for i in range(LOOK)}
    largest = torch.zeros(2, device=device)
    for k in range(1, steps + 1):
        x = torch.randn(BATCH, n, device=device)
        y = x @ target.mT + NOISE * torch.randn(BATCH, m, device=device)
        optimizer.zero_grad()
        ((layer(x) - y).square().sum() / (2 * BATCH)).backward()
        optimizer.step()
        if k in near:
            X = layer.weight.detach().as_subclass(Tensor).double()
            now = torch.stack((layer.manifold.drift(X), layer.manifold.cond(X)))
            largest = torch.maximum(largest, now.to(largest.dtype))
        if k in moments:
            found.append((k, float(largest[0]), float(largest[1])))
            largest = torch.zeros(2, device=device)
    return found


def measure(settings: Settings) -> Report:
    """Largest drift and condition number over many float32 steps with momentum 0.9."""
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    steps = settings.pick(20_000 if settings.device.type == "cuda" else 100_000, 40)
    rates = settings.pick(RATES, RATES[:1])
    cases = {f"{k}, lr {lr}": (lr, options) for k, options in _peers.OURS.items() for lr in rates}
    for case, (lr, options) in settings.chosen(cases).items():
        found = run(lr, steps, settings.device, options)
        row = {"case": case, "lr": lr, "steps": steps, "history": found}
        row |= {"drift": max(d for _, d, _ in found), "cond": max(c for *_, c in found)}
        rows.append(row)
        lines[case] = [(k, d) for k, d, _ in found]
    columns = {"case": "", "steps": "steps", "drift": "max drift", "cond": "max cond"}
    picture = Panel("drift in float32, momentum 0.9", "steps", "max |QᵀQ - I|", lines, level=1e-6)
    return Report(columns, rows, [picture])


if __name__ == "__main__":
    main("drift", measure)
