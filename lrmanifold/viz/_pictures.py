"""Singular values over training, and accuracy under attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .._arguments import check_flag, check_instance, check_integer, check_number, check_text
from ._look import (
    LINES,
    MARKERS,
    PALETTE,
    finish,
    legend_of,
    need_matplotlib,
    plain_figure,
    plain_log_ticks,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRENGTH = "attack strength ε (pixels are in 0..1)"


def spectra(
    history: Any,
    *,
    tau: float | Mapping[str, float | None] | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    title: str | None = None,
    columns: int = 4,
    moments: str = "epoch",
) -> Figure:
    """Singular values over training, a panel for each layer.

    The shaded band reaches from the smallest to the largest singular value, the thin lines are the
    ones between. Where a bound is given, a dashed line shows 1 + tau times the smallest: the
    largest value that it allows. Logarithmic and common to all panels.

    Parameters
    ----------
    history : History or mapping
        What :func:`lrmanifold.experiments.training.fit` returns, or a mapping from panel titles to
        arrays (moments, r): before training, then after each epoch.
    tau : float or mapping
        Bound of all panels, or of each by its title; None (or no entry) draws no bound.
    ax : Axes or sequence of Axes
        One for each panel; a new figure by default.
    title : str
        Above all panels.
    columns : int
        Panels side by side in a new figure.
    moments : str
        What one moment is, for the axis.
    """
    need_matplotlib()
    found = getattr(history, "spectra", history)
    check_instance("history", found, Mapping, "a History or a mapping")  # type: ignore[type-abstract]
    columns = check_integer("columns", columns, low=1)
    bounds = tau if isinstance(tau, Mapping) else {"tau": tau}
    for key, bound in bounds.items():
        if bound is not None:
            check_number("tau" if bounds is not tau else f"tau[{key!r}]", bound, low=0)
    panels = {k: _spectrum_array(k, v) for k, v in found.items()}
    if not panels:
        raise ValueError("history has no spectra: the model had no low-rank layer")
    with style():
        if ax is None:
            wide = min(columns, len(panels))
            high = math.ceil(len(panels) / wide)
            figure = plain_figure(1.0 + 3.3 * wide, 0.9 + 3.1 * high)
            grid = figure.subplots(high, wide, sharex=True, sharey=True, squeeze=False)
            axes = list(grid.flat)
            for unused in axes[len(panels) :]:
                unused.remove()
            left = {id(row[0]) for row in grid}
        else:
            axes = list(np.ravel(np.array(ax, dtype=object)))
            if len(axes) != len(panels):
                raise ValueError(f"ax must hold {len(panels)} Axes, one a panel, got {len(axes)}")
            figure, left = axes[0].figure, {id(a) for a in axes}
        handles: dict[str, Any] = {}
        for axis, (name, s) in zip(axes, panels.items(), strict=False):
            bound = tau.get(name) if isinstance(tau, Mapping) else tau
            handles.update(_spectrum_panel(axis, name, s, bound))
            axis.set_xlabel(moments)
            if id(axis) in left:
                axis.set_ylabel("singular value")
        plain_log_ticks(axes[: len(panels)], list(panels.values()))
        if ax is None:
            legend_of(figure, handles, columns=3)
        else:
            axes[0].legend(handles.values(), handles)
        if title:
            figure.suptitle(title)
    return figure


def accuracy_curves(
    results: Mapping[str, Mapping[float, float | Sequence[float]]],
    *,
    relative_to: str | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    xlabel: str = STRENGTH,
    legend: bool = True,
) -> Figure:
    """Accuracy against attack strength, a curve for each method.

    Parameters
    ----------
    results : mapping
        For each method, from strengths to the accuracy in [0, 1] (what
        :func:`lrmanifold.robustness.accuracy_under_attack` returns), or to those of several runs:
        then the curve is their mean, and the band one standard deviation each way.
    relative_to : str
        Name of a method: show the differences to it instead, run by run (to its mean, if it has
        another number of runs). Where curves lie close together this shows what they do not.
    ax : Axes
        A new figure by default.
    title, xlabel : str
    legend : bool
    """
    need_matplotlib()
    check_flag("legend", legend)
    if relative_to is not None:
        check_text("relative_to", relative_to)
    curves = _relative(results, relative_to)
    with style():
        if ax is None:
            figure = plain_figure(6.4, 4.6)
            axis = figure.subplots()
        else:
            figure, axis = cast("Figure", ax.figure), ax
        _accuracy_panel(axis, curves, list(curves), relative_to)
        axis.set_xlabel(xlabel)
        if title:
            axis.set_title(title)
        if legend:
            axis.legend(handlelength=3.2)
    return figure


def accuracy_panels(
    panels: Mapping[str, Mapping[str, Mapping[float, float | Sequence[float]]]],
    *,
    relative_to: str | None = None,
) -> Figure:
    """:func:`accuracy_curves` for several attacks side by side, with one legend.

    Parameters
    ----------
    panels : mapping
        For each attack, what :func:`accuracy_curves` takes. A method looks the same in all panels,
        and may be missing in some.
    relative_to : str
        Differences to this method in place of the accuracies, which often hide each other.
    """
    need_matplotlib()
    check_instance("panels", panels, Mapping, "a mapping")  # type: ignore[type-abstract]
    if not panels:
        raise ValueError("panels must hold at least one attack")
    if relative_to is not None:
        check_text("relative_to", relative_to)
    drawn = {title: _relative(results, relative_to) for title, results in panels.items()}
    methods = list(dict.fromkeys(name for curves in drawn.values() for name in curves))
    with style():
        figure = plain_figure(0.8 + 5.0 * len(panels), 4.4)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        handles: dict[str, Any] = {}
        for axis, (title, curves) in zip(axes, drawn.items(), strict=True):
            handles.update(_accuracy_panel(axis, curves, methods, relative_to))
            axis.set_xlabel(STRENGTH)
            axis.set_title(title)
        for axis in axes[1:]:
            axis.set_ylabel("")
        columns = min(3, 1 + len(panels))  # one panel is too narrow for three long names
        legend_of(figure, {name: handles[name] for name in methods}, columns=columns)
    return figure


def _relative(results: Any, relative_to: str | None) -> dict[str, dict[float, np.ndarray]]:
    """Of each method the accuracies in percent, or their differences to one of them."""
    check_instance("results", results, Mapping, "a mapping")  # type: ignore[type-abstract]
    curves = {name: _accuracies(name, curve) for name, curve in results.items()}
    if not curves:
        raise ValueError("results must hold at least one method")
    if relative_to is None:
        return curves
    if relative_to not in curves:
        raise ValueError(f"relative_to must be one of {list(curves)}, got {relative_to!r}")
    base = curves[relative_to]
    return {name: _differences(curve, base) for name, curve in curves.items()}


def _accuracy_panel(
    axis: Any, curves: dict[str, dict[float, np.ndarray]], methods: list[str], base: str | None
) -> dict[str, Any]:
    """Draw one panel, a method in the look of its place in `methods`; its lines by name."""
    handles = {}
    for name, curve in curves.items():
        i = methods.index(name)
        strengths = np.array(list(curve))
        mean = np.array([runs.mean() for runs in curve.values()])
        spread = np.array([runs.std(ddof=1) if len(runs) > 1 else 0 for runs in curve.values()])
        color = PALETTE[i % len(PALETTE)]
        (handles[name],) = axis.plot(
            strengths,
            mean,
            label=name,
            color=color,
            linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=3,
        )
        if spread.any():
            band = (mean - spread, mean + spread)
            axis.fill_between(strengths, *band, color=color, alpha=0.12, lw=0)
    if base is None:
        axis.set_ylabel("test accuracy (%)")
        axis.set_ylim(0, 100)
    else:
        axis.set_ylabel(f"accuracy minus {base}'s (points)")
    finish(axis)
    return handles


def _accuracies(name: str, curve: Mapping[float, Any]) -> dict[float, np.ndarray]:
    """Strengths in increasing order, to the accuracies in percent of all runs."""
    found = {float(eps): 100.0 * np.atleast_1d(np.asarray(curve[eps], float)) for eps in curve}
    if not found or not all(((a >= 0) & (a <= 100)).all() and a.size for a in found.values()):
        raise ValueError(f"accuracies of {name!r} must be in [0, 1], at least one of them")
    return dict(sorted(found.items()))


def _differences(
    curve: dict[float, np.ndarray], base: dict[float, np.ndarray]
) -> dict[float, np.ndarray]:
    common = [eps for eps in curve if eps in base]
    paired = {eps: len(curve[eps]) == len(base[eps]) for eps in common}
    return {eps: curve[eps] - (base[eps] if paired[eps] else base[eps].mean()) for eps in common}


def _spectrum_array(name: str, values: Any) -> np.ndarray:
    s = np.asarray(values, dtype=float)
    if s.ndim != 2 or not s.size or not bool((np.isfinite(s) & (s > 0)).all()):
        raise ValueError(
            f"the singular values of {name!r} must be positive, of shape (moments, r), "
            f"got shape {s.shape}"
        )
    return -np.sort(-s, axis=1)


def _spectrum_panel(axis: Any, name: str, s: np.ndarray, tau: float | None) -> dict[str, Any]:
    """Draw one panel; what the legend names, by label."""
    from matplotlib.ticker import MaxNLocator

    epochs = np.arange(len(s))
    top, bottom = s[:, 0], s[:, -1]
    blue, orange = PALETTE[1], PALETTE[2]
    axis.set_yscale("log")
    axis.fill_between(epochs, bottom, top, color=blue, alpha=0.18, lw=0)
    axis.plot(epochs, s[:, 1:-1], color=blue, lw=0.5, alpha=0.45)
    handles = {
        "largest": axis.plot(epochs, top, color=blue)[0],
        "smallest": axis.plot(epochs, bottom, color=blue, ls=(0, (1, 1)))[0],
    }
    if tau is not None:
        limit = axis.plot(epochs, (1.0 + tau) * bottom, color=orange, ls=(0, (4, 3)), lw=1.6)[0]
        handles["(1 + τ) × smallest"] = limit
    axis.set_title(f"{name}\ncond {top[-1] / bottom[-1]:.3g} at the end")
    axis.set_xlim(0, max(len(s) - 1, 1))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    finish(axis)
    return handles
