"""Pictures of the report, by matplotlib; curves and spectra are those of :mod:`lrmanifold.viz`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lrmanifold import viz

from .groups import ATTACKS, Group
from .published import EXPECTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
COLORS = (*viz.PALETTE, "#999999", "#8B4513", "#7F3C8D", "#5B8C5A")
# the same colour for a family in every picture of families
ORDER = (
    "dense SGD", "CondLR", "dense AdamW", "CondLRAdam", "A Bᵀ (SGD)", "dense, SVD-truncated",
    "DLRT", "dense SGD + label smoothing", "CondLR + label smoothing",
    "CondLRAdam + label smoothing", "dense AdamW + label smoothing",
)  # fmt: skip


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _tidy(axis: Any) -> None:
    axis.grid(True, color="#DDDDDD", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def curves(groups: Sequence[Group], relative_to: str) -> Figure | None:
    """Accuracy against strength for FGSM, PGD and PGD ℓ2; below, the difference to a method."""
    attacks = [
        a for a in ("fgsm", "pgd", "pgd_l2") if groups and all(g.head.get(a) for g in groups)
    ]
    if not attacks or relative_to not in {g.label for g in groups}:
        return None
    figure = _figure(0.8 + 4.4 * len(attacks), 7.6)
    grid = figure.subplots(2, len(attacks), sharex="col", sharey="row", squeeze=False)
    for column, attack in enumerate(attacks):
        results = {g.label: g.curve(attack) for g in groups}
        unit = "ℓ2 distance" if attack.endswith("l2") else "ℓ∞, pixels are in 0..1"
        top, below = grid[0, column], grid[1, column]
        viz.accuracy_curves(results, ax=top, title=ATTACKS[attack], legend=False, xlabel="")
        viz.accuracy_curves(
            results, ax=below, relative_to=relative_to, legend=False, xlabel=f"strength ({unit})"
        )
        if column:
            top.set_ylabel("")
            below.set_ylabel("")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, frameon=False, handlelength=3.2
    )
    return figure


def conditioning(groups: Sequence[Group]) -> Figure | None:
    """Largest condition number of a layer over training, all seeds."""
    shown = [g for g in groups if g.head.get("cond")]
    if not shown:
        return None
    figure = _figure(7.6, 4.2)
    axis = figure.subplots()
    for i, group in enumerate(shown):
        runs = [row["cond"] for row in group.rows if row.get("cond")]
        length = min(map(len, runs))
        mean = np.mean([r[:length] for r in runs], axis=0)
        style: Any = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        axis.plot(range(length), mean, label=group.label, lw=1.8, ms=5, **style)
    axis.set_yscale("log")
    viz.plain_log_ticks([axis], [np.concatenate([row["cond"] for g in shown for row in g.rows])])
    axis.set_xlabel("epoch")
    axis.set_ylabel("largest cond of a layer")
    _tidy(axis)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def spectra(group: Group) -> Figure | None:
    """Singular values of each low-rank layer over training (first seed)."""
    found = group.head.get("spectra")
    if not found:
        return None
    if any(len({len(moment) for moment in moments}) > 1 for moments in found.values()):
        found = {k: [[m[0], m[-1]] for m in moments] for k, moments in found.items()}
    return viz.spectra(found, tau=group.head["method"]["tau"], title=group.label)


def compression(groups: Sequence[Group], eps: str, attack: str) -> Figure | None:
    """Clean and robust accuracy against the share of parameters that inference needs."""
    shown = [g for g in groups if g.mean(attack, eps) is not None]
    families = _by_bound(_families(shown))
    if not families:
        return None
    figure = _figure(10.5, 4.2)
    for axis, (title, path) in zip(
        figure.subplots(1, 2),
        (("clean", ("clean", "accuracy")), (f"{ATTACKS[attack]} {eps}", (attack, eps))),
        strict=True,
    ):
        for i, (name, members) in enumerate(families.items()):
            points = sorted(members, key=lambda g: g.mean("parameters", "folded_share") or 0.0)
            x = [100 * (g.mean("parameters", "folded_share") or 0.0) for g in points]
            y = [100 * (g.mean(*path) or 0.0) for g in points]
            error = [100 * g.spread(*path) for g in points]
            color, marker = _style(name, i)
            style: Any = {"color": color, "marker": marker, "lw": 1.6, "ms": 6, "capsize": 2}
            axis.errorbar(x, y, error, label=name, **style)
        axis.set_xlabel("parameters kept for inference (%)")
        axis.set_ylabel("accuracy (%)")
        axis.set_title(title)
        _tidy(axis)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def frontier(data: str, groups: Sequence[Group], eps: str = "0.06") -> Figure | None:
    """Clean against robust accuracy, a curve for each family over its own hyper-parameters.

    Small points are all settings; the line joins those that no other setting of the family beats
    in both. Low-rank families count only with at least 65 % of the parameters saved.
    """
    families = _families([g for g in groups if allowed(g)])
    if not families:
        return None
    figure = _figure(11.5, 5.2)
    for axis, attack in zip(figure.subplots(1, 2), ("fgsm", "pgd"), strict=True):
        best: list[float] = []
        for i, (name, members) in enumerate(families.items()):
            points = [
                (100 * g.mean("clean", "accuracy"), 100 * g.mean(attack, eps))  # type: ignore[operator]
                for g in members
                if g.mean(attack, eps) is not None
            ]
            if not points:
                continue
            color, marker = _style(name, i)
            axis.scatter(*zip(*points, strict=True), color=color, marker=marker, s=22, alpha=0.45)
            hull = efficient(points)
            axis.plot(*zip(*hull, strict=True), color=color, marker=marker, ms=7, lw=2, label=name)
            best += [p[0] for p in points]
        if attack == "fgsm" and data in EXPECTED:
            x, y = EXPECTED[data]
            axis.plot(x, y, marker="*", ms=16, color="#B00020", ls="none", label="aim")
            best.append(x)
        low = np.quantile(best, 0.15) if best else 0
        axis.set_xlim(low - 0.3, max(best, default=1) + 0.15)
        axis.set_xlabel("clean accuracy (%)")
        axis.set_ylabel(f"accuracy under {ATTACKS[attack]} {eps} (%)")
        _tidy(axis)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def allowed(group: Group) -> bool:
    """Dense, or small: at least 65 % of the parameters saved for inference."""
    dense = group.head["method"]["kind"] in ("dense", "spectral_norm", "orthogonal")
    return dense or (group.mean("parameters", "folded_share") or 1.0) <= 0.35


def efficient(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, by the first."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found[::-1]


def _families(groups: Sequence[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.family, []).append(group)
    places = {name: place for place, name in enumerate(ORDER)}
    return dict(sorted(found.items(), key=lambda item: places.get(item[0], len(ORDER))))


def _by_bound(families: dict[str, list[Group]]) -> dict[str, list[Group]]:
    """Families of several bounds τ as one for each."""
    found: dict[str, list[Group]] = {}
    for name, members in families.items():
        bounds = {g.head["method"]["tau"] for g in members}
        for group in members:
            tau = group.head["method"]["tau"]
            key = f"{name} τ={tau:g}" if len(bounds) > 1 and tau is not None else name
            found.setdefault(key, []).append(group)
    return found


def _style(family: str, place: int) -> tuple[str, str]:
    """Colour and marker; families that have no place of their own share what is left."""
    place = ORDER.index(family) if family in ORDER else len(ORDER) + place
    # The second time round a colour comes with another marker.
    return COLORS[place % len(COLORS)], MARKERS[(place + place // len(COLORS)) % len(MARKERS)]
