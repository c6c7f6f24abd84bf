"""The look of :mod:`lrmanifold.viz`, and what pictures of orders and bounds need beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lrmanifold.viz import MARKERS, PALETTE, legend_below, new_figure

__all__ = ["COLOURS", "MARKERS", "diagonal", "legend_below", "new", "powers_of_two", "slope"]

# The first is for text and lines of reference.
COLOURS = PALETTE
new = new_figure


def powers_of_two(ax: Any) -> None:
    """Log-log axes whose steps are read as powers of two."""
    ax.set_yscale("log")
    ax.set_xscale("log", base=2)
    ax.minorticks_off()


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y against log x."""
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    spread = sum((u - mean_a) ** 2 for u in a)
    return sum((u - mean_a) * (v - mean_b) for u, v in zip(a, b, strict=True)) / spread


def diagonal(ax: Any, values: Sequence[float], label: str = "measured = bound") -> None:
    """The line y = x over the range of `values`, on logarithmic axes."""
    low, high = min(values), max(values)
    ax.plot([low, high], [low, high], color=COLOURS[0], linewidth=1, label=label)
    ax.set(xscale="log", yscale="log")
