"""Log-log pictures of measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lrmanifold.viz import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "os^DvPX*<>"


@dataclass(frozen=True)
class Panel:
    """One pair of axes: `lines` maps labels to points (x, y); `level` is a dashed horizontal."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    level: float | None = None


def draw(panels: Sequence[Panel], columns: int = 2) -> Figure:
    """A figure of the panels, log-log; matplotlib's global settings stay as they are."""
    from matplotlib.figure import Figure

    wide = min(columns, len(panels))
    high = math.ceil(len(panels) / wide)
    figure = Figure(figsize=(6.4 * wide, 4.2 * high), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=False):
        for i, (label, points) in enumerate(panel.lines.items()):
            known = [(x, y) for x, y in points if x > 0 and y > 0 and math.isfinite(y)]
            if known:
                ax.loglog(
                    *zip(*known, strict=True),
                    marker=MARKERS[i % len(MARKERS)],
                    color=PALETTE[i % len(PALETTE)],
                    linestyle="-" if i < len(PALETTE) else "--",
                    label=label,
                )
        if panel.level is not None:
            ax.axhline(panel.level, color="grey", linestyle="--", linewidth=1)
        ax.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        ax.grid(alpha=0.3, which="both")
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[1]:
            # Below the axes: with many peers it would lie on the curves.
            ax.legend(
                frameon=False,
                fontsize="small",
                loc="upper center",
                bbox_to_anchor=(0.5, -0.15),
                ncols=2,
            )
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure
