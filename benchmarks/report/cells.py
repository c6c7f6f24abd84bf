"""Tables in Markdown and their cells, for all parts of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .results import Group, Results, strength


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(group: Group, *path: str) -> str:
    """Mean ± standard deviation in %; a dash where nothing was measured."""
    count, rows = len(group.values(*path)), len(group.rows)
    if not count:
        return "–"
    text = f"{100 * group.mean(*path):.1f}"
    text += f" ± {100 * group.spread(*path):.1f}" if count > 1 else ""
    return text + (f" ({count} of {rows})" if count < rows else "")


def accuracy(results: Results, groups: Sequence[Group]) -> str:
    """The table of families with their accuracies in every column that the plan asks for."""
    attack, eps = results.plan.attack, results.eps
    columns: list[tuple[str, tuple[str, ...]]] = [
        ("clean", results.column("clean")),
        *(
            (f"**worst {strength(e)}**", ("worst", f"{e:g}", "accuracy"))
            for e in _strengths(results)
        ),
        *((f"worst ℓ2 {strength(e)}", ("worst_l2", f"{e:g}", "accuracy")) for e in attack.worst_l2),
        *((f"PGD {strength(e)}", ("pgd", f"{e:g}")) for e in attack.pgd if f"{e:g}" == eps),
        *((f"FGSM {strength(e)}", ("fgsm", f"{e:g}")) for e in attack.fgsm),
        *((f"transfer {strength(e)}", ("transfer", f"{e:g}")) for e in attack.transfer),
    ]
    rows = []
    for group in groups:
        counts = {"diverged": len(group.rows) - len(group.done)}
        counts["at chance"] = len(group.done) - len(group.trained)
        lost = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        seeds = str(len(group.rows)) + (f" ({lost})" if lost else "")
        kept = f"{100 * group.done[0]['stored_share']:.0f} %" if group.done else "–"
        cells = [percent(group, *path) for _, path in columns]
        rows.append([group.family.name, kept, seeds, *cells])
    return table(["family", "weights stored", "seeds", *(name for name, _ in columns)], rows)


def _strengths(results: Results) -> list[float]:
    return sorted({results.plan.attack.eps, *results.plan.attack.worst})
