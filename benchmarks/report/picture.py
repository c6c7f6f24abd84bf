"""The frontier as a picture: clean accuracy against the worst case, with error bars."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np

from lrmanifold import viz

from ..robustness.plan import Family
from .results import Results, efficient, strength, trial_point

SHOWN = 0.15  # how far below the most accurate setting of its side the frontier is drawn

_KINDS = {
    "dense": "dense",
    "svd": "truncated",
    "finetuned": "truncated",
    "factors": "A Bᵀ",
    "orthogonal": "orthogonal, full rank",
    "condlr": "no bound",
    "fixed_rank": "no bound",
}


def method(family: Family) -> str:
    """Its kind in words, without size or setting."""
    if family.ours:
        return "CondLRAdam" if family.optimizer == "adam" else "CondLR"
    if "penalty" in family.start:
        return "penalty"
    return _KINDS.get(family.method.kind, family.method.kind)


def size(results: Results, family: Family) -> str:
    """Weights that its networks store, where a plan has several sizes; otherwise empty."""
    several = any(f.ranks is not None for f in results.plan.families)
    if not several or family.method.kind in ("dense", "orthogonal"):
        return ""
    group = next(g for g in results.groups if g.family.name == family.name)
    return f"{100 * group.done[0]['stored_share']:.0f} %" if group.done else ""


def side(results: Results, family: Family) -> str:
    """Families of one side are drawn alike: one method and, where a plan has several, one size."""
    name, stored = method(family), size(results, family)
    return f"{name}, {stored}" if stored else name


def looks(results: Results) -> dict[str, dict[str, Any]]:
    """Of each side: its method's colour, and the marker of its size, if there are several."""
    families = results.plan.families
    methods = list(dict.fromkeys(method(f) for f in families))
    sizes = list(dict.fromkeys(size(results, f) for f in families))
    found = {}
    for family in families:
        color = methods.index(method(family))
        marker = sizes.index(size(results, family)) if len(sizes) > 1 else color
        found[side(results, family)] = {
            "color": viz.PALETTE[color % len(viz.PALETTE)],
            "marker": viz.MARKERS[marker % len(viz.MARKERS)],
        }
    return found


def frontier(results: Results) -> bytes:
    """A PNG: settings that no other of its side beats in validation; the chosen ones in test.

    Bars on the left are standard errors over the seeds of the search, on the right standard
    deviations over the seeds of the test that did not diverge.
    """
    figure, axes = viz.new_figure(2, width=5.6, height=4.8)
    for name, drawn in looks(results).items():
        look: dict[str, Any] = {**drawn, "capsize": 2, "label": name}
        own = [t for t in results.trials if side(results, results.plan.family(t["family"])) == name]
        best = efficient(own, trial_point)
        top = max(trial_point(t)[0] for t in best)
        # what learned next to nothing would squeeze all others into a corner
        best = [t for t in best if trial_point(t)[0] >= top - SHOWN]
        bars = [[_error(t[key]) for t in best] for key in ("clean", "worst")]
        x, y = np.array([trial_point(t) for t in best]).T
        _bars(axes[0], x, y, *bars, line="-", **look)
        # a diverged seed, 0 % in the table, would squeeze all others into a corner
        groups = [
            replace(g, rows=g.done)
            for g in results.groups
            if side(results, g.family) == name and g.done
        ]
        if not groups:
            continue
        paths = [results.column(c) for c in ("clean", "worst")]
        x, y = (np.array([g.mean(*path) for g in groups]) for path in paths)
        _bars(axes[1], x, y, *([g.spread(*p) for g in groups] for p in paths), line="", **look)
    for axis, title in zip(
        axes, ("validation: the best of all trials", "test: chosen"), strict=True
    ):
        axis.set_title(title)
        axis.set_xlabel("clean accuracy (%)")
        axis.set_ylabel(
            f"worst case, {results.plan.attack.norm} {strength(results.plan.attack.eps)} (%)"
        )
        axis.grid(True, color="#DDDDDD", linewidth=0.7)
    viz.legend_below(figure, axes[0], columns=4)
    return png(figure)


def curves(results: Results) -> bytes | None:
    """A PNG: PGD at all strengths against the family of each side that validation scores best.

    A panel for each size that a plan has, with the full networks in all of them.
    """
    if not results.plan.attack.pgd:
        return None
    by_side: dict[str, list[str]] = {}
    for family in results.plan.families:
        by_side.setdefault(side(results, family), []).append(family.name)
    sizes = dict.fromkeys(size(results, f) for f in results.plan.families)
    panels: dict[str, dict[str, dict[float, list[float]]]]
    panels = {stored: {} for stored in sizes if stored or len(sizes) == 1}
    for names in by_side.values():
        family = (group := results.speaks(names)).family
        found = {0.0: group.values("clean", "accuracy")}
        found |= {eps: group.values("pgd", f"{eps:g}") for eps in results.plan.attack.pgd}
        for stored, shown in panels.items():
            if size(results, family) in ("", stored):
                label = method(family) if stored else family.name
                shown[label] = {eps: list(by.values()) for eps, by in found.items() if by}
    data = f"PGD, {results.plan.network.data}"
    title = {stored: f"{data}, {stored} of the weights" if stored else data for stored in panels}
    return png(viz.accuracy_panels({title[s]: shown for s, shown in panels.items()}))


def png(figure: Any) -> bytes:
    """As a file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _bars(axis: Any, x: Any, y: Any, dx: Any, dy: Any, *, line: str, **look: Any) -> None:
    dx, dy = 100 * np.array(dx), 100 * np.array(dy)
    axis.errorbar(100 * x, 100 * y, dy, dx, ls=line, lw=1.4, ms=5, elinewidth=0.8, **look)


def _error(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
