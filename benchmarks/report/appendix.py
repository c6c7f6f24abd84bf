"""The last part of a page: everything that a reader may ask for and few will."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from . import published
from .cells import accuracy, percent, table
from .results import Group, Results, strength


def sections(results: Results) -> list[str]:
    """Further settings, PGD, attacks one by one, cost, masking, conditioning, published rows."""
    others = [g for g in results.groups if g not in results.main()]
    parts = []
    if others:
        shares = ", ".join(f"{s:g}" for s in results.plan.search.robust_share[1:])
        parts += [
            f"### Further settings of the frontier\n\nChosen among the same trials by a score "
            "with the "
            f"worst case at weight {shares}.",
            accuracy(results, others),
        ]
    attack = results.plan.attack
    if attack.pgd:
        rows = [
            [g.family.name, *(percent(g, "pgd", f"{e:g}") for e in attack.pgd)]
            for g in results.main()
        ]
        words = "The family of each side that validation scores best; bands: standard deviations."
        parts += ["### PGD", f"![accuracy against the strength of PGD](pgd.png)\n\n{words}"]
        parts += [table(["family", *(strength(e) for e in attack.pgd)], rows)]
    if any(g.done for g in results.main()):
        after = "### What is left after each attack and all before it (first seed)"
        here = "in this table and the next its row is of a later one, if any did not"
        parts += [after, _after(results), *_without_first(results, here)]
        parts += ["### Size, cost, conditioning", _cost(results)]
    checked = [g for g in results.main() if g.done and g.done[0].get("masking")]
    if checked:
        parts += ["### Do gradients mislead the attacks? (first seed)", _masking(checked)]
        parts += _without_first(results, "it is not in this table")
    bounded = [g for g in results.main() if g.done and "bound" in g.done[0].get("condition", {})]
    if bounded:
        parts += [
            "### Condition number of the network, and its bound (first seed)",
            _bound(bounded),
            *_without_first(results, "it is not in this table"),
        ]
    lines = published.of(results.plan.network.data)
    if lines is not None:
        strengths, figures, note = lines
        rows = [[f.method, f.saved, *(f"{a:g}" for a in f.accuracy)] for f in figures]
        parts += ["### Published, with other attacks and training"]
        parts += [table(["method", "saved", *strengths], rows), note]
    return parts


def _without_first(results: Results, so: str) -> list[str]:
    """What a table of the first seed has in place of one that diverged."""
    lost = [g.family.name for g in results.main() if g.rows[0].get("diverged")]
    return [f"The first seed of {name} diverged: {so}." for name in lost]


def _after(results: Results) -> str:
    groups = [g for g in results.main() if g.done]
    firsts = [group.done[0]["worst"][results.eps] for group in groups]
    names = max((first["attacks"] for first in firsts), key=len)  # in the order in which they ran
    rows = []
    for group, first in zip(groups, firsts, strict=True):
        after = {name: f"{100 * left:.1f}" for name, left in first["after"].items()}
        rows.append([group.family.name, *(after.get(name, "–") for name in names)])
    return table(["family", *names], rows)


def _cost(results: Results) -> str:
    plan = results.plan
    rows = []
    for group in results.main():
        if not group.done:
            continue
        row = group.done[0]
        compared = {n: x["cond"] for n, x in row["layers"].items() if n not in plan.network.exclude}
        conds = [cond for cond in compared.values() if cond is not None]
        # the median: a row that went on from a checkpoint knows only the rest of its training
        seconds = float(np.median([r["train_cpu_seconds"] for r in group.done]))
        rows.append(
            [
                group.family.name,
                f"{100 * row['trained_share']:.1f} %",
                f"{100 * row['stored_share']:.1f} %",
                f"{row['multiply_adds'] / 1000:,.0f} k",
                f"{max(conds):.3g}" if conds else "–",
                # 0 of a seed that diverged would be perfect calibration
                percent(replace(group, rows=group.done), "clean", "ece"),
                f"{seconds:.1f}",
            ]
        )
    head = ["family", "trained", "stored", "multiply-adds", "largest cond", "ECE", "CPU s"]
    return table(head, rows) + (
        "\n\nLargest cond: of a layer's weight as a matrix, among the layers that are low-rank in "
        "some family, first seed. ECE: calibration error, of the seeds that did not diverge. CPU "
        "seconds of one training, median of the seeds, on a busy machine; of a GPU's host where it "
        "ran there; of a training that was cut off only what came after. Multiply-adds: of one "
        "image; a network that is truncated and not trained on keeps dense matrices here, so it "
        "has as many as a dense one."
    )


def _masking(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        m = group.done[0]["masking"]
        box = ", ".join(
            f"{100 * a:.1f} ({q})"
            for q, a in sorted(m["black_box"].items(), key=lambda item: int(item[0]))
        )
        cells = [f"{100 * m[key]:.1f}" for key in ("one_step", "many_steps", "unlimited")]
        failed = "; ".join(f"not: {name}" for name in m["failed"])
        alone = [f"{100 * m['only_black_box']:.1f}"]
        alone.append(f"{100 * m['climbed']:.1f}" if "climbed" in m else "–")
        rows.append([group.family.name, *cells, box, *alone, failed or "passes"])
    head = [
        "family", "one step", "PGD", "no limit", "Square (queries)", "Square alone",
        "search from PGD's end", "checks",
    ]  # fmt: skip
    return table(head, rows)


def _bound(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        c = group.done[0]["condition"]
        rows.append(
            [
                group.family.name,
                f"{c['network']['median']:.3g}",
                f"{c['tail']['median']:.3g}",
                f"{c['bound']['median']:.3g}",
                f"{c['ratio']['max']:.2g}",
                f"{100 * c['plain_product_violated']:.0f} %",
            ]
        )
    head = [
        "family", "network, median", "linear layers at the end, median", "bound, median",
        "measured / bound, largest", "product without cosines violated",
    ]  # fmt: skip
    return table(head, rows)
