"""Forward and backward of one low-rank layer against the dense one: where low rank breaks even.

Inputs carry gradients, as inside a network. Convolutions run in both memory formats, and the better
one counts, for the dense layer as for ours.

    python -m benchmarks.speed.layer [--device cuda] [--threads 1] [--quick] [--output DIR]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrmanifold.nn import LowRankConv2d, LowRankLinear

from ._plot import Panel
from ._problems import FORMATS
from ._run import Report, Settings, main
from ._timing import Samples, interleave

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)


@dataclass(frozen=True)
class Case:
    """A dense layer and the shape of its input."""

    layer: Callable[[], nn.Module]
    input: tuple[int, ...]

    @property
    def formats(self) -> tuple[str, ...]:
        """Memory formats to try."""
        return tuple(FORMATS) if len(self.input) == 4 else ("contiguous",)


def _linear(size: int, batch: int) -> Case:
    return Case(lambda: nn.Linear(size, size), (batch, size))


def _convolution(channels: int, side: int, batch: int) -> Case:
    layer = lambda: nn.Conv2d(channels, channels, 3, padding=1)  # noqa: E731
    return Case(layer, (batch, channels, side, side))


CASES = {
    "linear 768, batch 32": _linear(768, 32),
    "linear 768, batch 128": _linear(768, 128),
    "linear 768, batch 1024": _linear(768, 1024),
    "linear 4096, batch 128": _linear(4096, 128),
    "linear 4096, batch 1024": _linear(4096, 1024),
    "conv 64 at 32x32, batch 32": _convolution(64, 32, 32),
    "conv 256 at 8x8, batch 32": _convolution(256, 8, 32),
    "conv 256 at 8x8, batch 128": _convolution(256, 8, 128),
    "conv 512 at 4x4, batch 32": _convolution(512, 4, 32),
}
QUICK = {"linear 64, batch 8": _linear(64, 8), "conv 16 at 8x8, batch 2": _convolution(16, 8, 2)}


def low_rank(dense: Any, share: float) -> nn.Module:
    """Our layer of the same size, at that share of min(m, n)."""
    rank = max(1, round(share * min(dense.weight.shape[0], dense.weight[0].numel())))
    kind: Any = LowRankLinear if isinstance(dense, nn.Linear) else LowRankConv2d
    return kind.from_dense(dense, rank, init="random")


def passes(layer: nn.Module, shape: tuple[int, ...], format: str, device: torch.device):
    """A forward and backward pass of the layer on inputs of that shape and memory format."""
    options: Any = {"memory_format": FORMATS[format]} if len(shape) == 4 else {}
    layer = layer.to(device, **options)
    x = torch.randn(shape, device=device).contiguous(**options).requires_grad_()
    y = torch.randn_like(layer(x))

    def both() -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(y)

    return both


def break_even(points: list[tuple[float, float]]) -> float:
    """The largest share before the time first exceeds the dense one; log-log interpolation."""
    below: tuple[float, float] | None = None
    for share, ratio in points:
        if ratio > 1.0:
            if below is None:
                return math.nan
            slope = math.log(ratio / below[1]) / math.log(share / below[0])
            return below[0] * math.exp(-math.log(below[1]) / slope)
        below = share, ratio
    return 1.0


def _best(samples: Samples, name: str, case: Case) -> str:
    keys = [f"{name}, {format}" for format in case.formats]
    return min(keys, key=lambda key: samples.time(key).median)


def measure(settings: Settings) -> Report:
    """Forward + backward of a low-rank layer / dense over r / min(m, n); below 1 it pays."""
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, case in settings.chosen(settings.pick(CASES, QUICK)).items():
        tasks = {}
        for format in case.formats:
            dense = case.layer()
            shares = {f"{s:g}": low_rank(dense, s) for s in settings.pick(SHARES, (0.2, 1.0))}
            for key, layer in {"dense": dense, **shares}.items():
                tasks[f"{key}, {format}"] = passes(layer, case.input, format, settings.device)
        samples = interleave(
            tasks, device=settings.device, rounds=settings.rounds, budget=settings.budget
        )
        reference = _best(samples, "dense", case)
        for key in ("dense", *shares):
            best = _best(samples, key, case)
            row: dict[str, Any] = {"case": name, "share": key, "format": best.split(", ")[1]}
            row |= {"ms": samples.time(best).median * 1e3, "seconds": samples.time(best)}
            rows.append(row | {"ratio": samples.ratio(best, reference)})
            if key != "dense":
                lines.setdefault(name, []).append((float(key), rows[-1]["ratio"].median))
        rows[-1]["break_even"] = break_even(lines[name])
    columns = {
        "case": "layer",
        "share": "r / min(m, n)",
        "format": "format",
        "ms": "ms",
        "ratio": "/ dense",
        "break_even": "breaks even at",
    }
    picture = Panel("forward + backward", "r / min(m, n)", "time / dense", lines, level=1.0)
    return Report(columns, rows, [picture])


if __name__ == "__main__":
    main("layer", measure)
