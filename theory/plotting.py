"""One look for all pictures: colour-blind safe (Okabe-Ito), thin grids, labelled axes.

matplotlib is of the extra ``[demo]`` and is imported when a picture is asked for, not before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# Okabe and Ito 2008; the first is for text and lines of reference.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_RC: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
}


def new(columns: int = 1, *, width: float = 6.0, height: float = 4.4, **subplots: Any) -> Any:
    """A figure without global state, and its axes (one, or an array of `columns`)."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        return figure, figure.subplots(1, columns, **subplots)


def powers_of_two(ax: Any) -> None:
    """Log-log axes whose steps are read as powers of two."""
    ax.set_yscale("log")
    ax.set_xscale("log", base=2)
    ax.minorticks_off()


def legend_below(figure: Any, ax: Any, *, columns: int = 2, title: str | None = None) -> None:
    """A legend outside of the axes, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, title=title, frameon=False
    )


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
