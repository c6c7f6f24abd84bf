"""The frontier's claim, checked: at every clean accuracy that a dense network reaches, is a small
CondLR network at least as accurate and harder to fool?"""

from __future__ import annotations

from collections.abc import Sequence

from .figures import allowed
from .groups import ATTACKS, Group
from .tables import TableText

SLACK = 0.001  # of clean accuracy: a tenth of a point is below any seed's spread


def frontier_claim(data: str, groups: Sequence[Group], eps: str) -> TableText:
    """A row for each dense setting: the best small CondLR setting that is as accurate."""
    attacks = ("fgsm", "pgd")
    head = ["dense network", "clean"]
    for attack in attacks:
        name = f"{ATTACKS[attack]} {eps}"
        head += [name, f"best CondLR as accurate, {name}", "harder to fool"]
    table = TableText(f"{data}: does the claim hold?", head)
    small = [g for g in groups if g.head["method"]["kind"] == "condlr" and allowed(g)]
    dense = [g for g in groups if g.head["method"]["kind"] == "dense"]
    if not small:
        return table
    for group in sorted(dense, key=lambda g: g.mean("clean", "accuracy") or 0.0):
        level = group.mean("clean", "accuracy") or 0.0
        extra = _smoothing(group)
        cells = [_with_rate(group), f"{100 * level:.2f}"]
        equal = [
            g
            for g in small
            if (g.mean("clean", "accuracy") or 0.0) >= level - SLACK and _smoothing(g) == extra
        ]
        for attack in attacks:
            own = group.mean(attack, eps)
            measured = [g for g in equal if g.mean(attack, eps) is not None]
            best = max(measured, key=lambda g: g.mean(attack, eps) or 0.0, default=None)
            if own is None or best is None:
                cells += ["–" if own is None else f"{100 * own:.1f}", "none is", "no"]
                continue
            value = best.mean(attack, eps) or 0.0
            cells += [
                f"{100 * own:.1f}",
                f"{100 * value:.1f}: {_with_rate(best)}",
                "yes" if value > own else "no",
            ]
        table.rows.append(cells)
    table.note = (
        "Means over the seeds that a setting has. CondLR and CondLRAdam "
        "count with at most 35 % of the parameters kept and a clean accuracy at most 0.1 points "
        "lower; smoothed labels are compared with smoothed ones. The best setting is chosen on the "
        "test images, for both sides."
    )
    return table


def _with_rate(group: Group) -> str:
    return group.label if ", lr " in group.label else f"{group.label}, lr {group.head['lr']:g}"


def _smoothing(group: Group) -> str:
    return " + label smoothing" if group.head["training"]["label_smoothing"] else ""
