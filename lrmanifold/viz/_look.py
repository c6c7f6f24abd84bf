"""One look for all pictures: colours, markers, figures without global state, legends outside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color universal design", without their yellow (too pale on white); grey, brown.
PALETTE = (
    "#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A",
    "#8C564B",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "p")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
_SLIDE: Any = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "legend.fontsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "legend.frameon": False,
}
_PAGE: Any = {
    **_SLIDE,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
}


def new_figure(
    columns: int = 1,
    *,
    rows: int = 1,
    width: float = 6.0,
    height: float = 4.4,
    **subplots: Any,
) -> tuple[Figure, Any]:
    """An empty figure in the look of this library, without pyplot's global state.

    Parameters
    ----------
    columns, rows : int
        Axes side by side, and one below the other.
    width, height : float
        Of each of them, in inches.
    **subplots
        For ``Figure.subplots``, as ``sharey=True``.

    Returns
    -------
    figure : matplotlib.figure.Figure
    axes : Axes or array of Axes
        One, or an array as ``Figure.subplots`` gives it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_PAGE):
        made = Figure(figsize=(width * columns, height * rows), layout="constrained")
        return made, made.subplots(rows, columns, **subplots)


def legend_below(figure: Figure, ax: Axes, *, columns: int = 2, title: str | None = None) -> None:
    """The legend of `ax` below all axes of the figure, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, title=title, frameon=False
    )


def plain_log_ticks(axes: Sequence[Any], panels: Sequence[np.ndarray]) -> None:
    """Plain numbers, more of them the smaller the range: a spectrum often spans no decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    span = max(s.max() for s in panels) / min(s.min() for s in panels)
    steps: list[float] = [1, 2, 5] if span < 300 else [1]
    if span < 10:
        steps = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8] if span < 4 else [1, 1.5, 2, 3, 4, 5, 7]
    for axis in axes:
        axis.yaxis.set_major_locator(LogLocator(subs=steps))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(which="minor", length=0)


def plain_figure(width: float, height: float) -> Figure:
    """Without pyplot: no window, no backend, and nothing that somebody has to close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def legend_of(figure: Figure, handles: dict[str, Any], columns: int) -> None:
    """A legend of the given handles by label, below all axes."""
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        handlelength=3.2,
    )


def finish(axis: Any) -> None:
    """Grid and ticks."""
    # explicitly, not by rcParams: ticks are made when the figure is drawn, outside the context
    axis.grid(True, color="#DDDDDD", linewidth=0.7)
    axis.tick_params(labelsize=11)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Settings for slides, and the user's own afterwards."""
    import matplotlib

    with matplotlib.rc_context(_SLIDE):
        yield


def need_matplotlib() -> None:
    """Say at the beginning of a long run what would fail at its end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, not installed: pip install 'lrmanifold[demo]'"
        ) from error
