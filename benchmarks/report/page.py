"""A table's page in Markdown: what was expected, what came out, everything else below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lrmanifold.experiments.runs import write_atomically

from ..robustness.plan import Hypothesis
from . import conditioning, published
from .picture import SHOWN, curves, frontier, side
from .results import (
    LEAST_SEEDS,
    Finding,
    Group,
    Results,
    efficient,
    findings,
    pairs,
    strength,
    trial_point,
)

VERDICTS = "yes / no only where the whole interval lies on one side, from five seeds or more"


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


def write(results: Results, folder: Path) -> Path:
    """Write ``report.md`` and its pictures beside the plan; returns the first."""
    plan = results.plan
    write_atomically(folder / "frontier.png", frontier(results))
    attacked = curves(results)
    if attacked is not None:
        write_atomically(folder / "pgd.png", attacked)
    parts = [
        f"# {plan.title}",
        _registration(results),
        "## What was expected and what came out",
        _findings(findings(results)),
        *_remarks(folder),
        "## The chosen settings on the test images",
        _accuracy(results, sorted(results.main(), key=lambda g: -g.mean(*results.column("worst")))),
        _legend(results),
        "## The whole frontier",
        f"![clean against worst-case accuracy of {plan.network.model} on {plan.network.data}]"
        "(frontier.png)",
        "Left: of each side all settings that no other one beats in both, on validation images, "
        f"{_left_bars(results)}; not those more than {100 * SHOWN:.0f} points less accurate than "
        "the side's best. Right: the chosen settings on test "
        "images, with standard deviations over the seeds of the test that did not diverge.",
        "In how many pairs of settings is one as accurate as the other (at most 0.1 points less), "
        "and in how many of these harder to fool? On validation images, all trials that did not "
        "diverge, those at chance too; in brackets the best of each side only. In parentheses "
        "after a side: its trials; more trials have a better best.",
        _pairs(results),
        "## How they were chosen",
        _search(results),
        "## Appendix",
        *_appendix(results),
        *conditioning.section(results, folder),
    ]
    path = folder / "report.md"
    write_atomically(path, ("\n\n".join(part for part in parts if part) + "\n").encode())
    return path


def _registration(results: Results) -> str:
    plan, first = results.plan, results.groups[0].rows[0]
    commits = {row["plan_commit"] for g in results.groups for row in g.rows}
    where = ", ".join(sorted(f"`{c}`" if c else "none: not registered" for c in commits))
    made = {row["conditions"]["commit"] for g in results.groups for row in g.rows}
    code = ", ".join(f"`{c}`" for c in sorted(made - {None}))
    tried = {t.get("conditions", {}).get("commit") for t in results.trials}
    search = ", ".join(f"`{c}`" for c in sorted(tried - {None})) or "code that they do not name"
    training = ", ".join(f"{k} {v}" for k, v in plan.training.items())
    note = " ".join(plan.note.split())
    how = plan.adversarial
    if how is not None:
        many = "" if how.kind == "single" else f", {how.steps} steps"
        training += f", adversarial: {how.kind}, {how.norm} {strength(how.eps)}{many}"
    if missing := len(plan.seeds) - len(results.seeds):
        note = f"**{missing} of the {len(plan.seeds)} planned seeds are not finished.** {note}"
        families = len(results.groups)
        for seed, count in results.begun.items():
            note = (
                f"Seed {seed} has {count} of {families} rows, in `runs.jsonl` and not here. {note}"
            )
    if results.missing:
        note = f"**Planned, and not run on the test images: {'; '.join(results.missing)}.** {note}"
    return (
        f"{plan.network.model} on {plan.network.data}, {training}. Accuracy in %. The plan, "
        f"`plan.toml` ({plan.digest}), was committed before the runs in {where}; rows were made by "
        f"the code of {code or 'no commit'}, trials by {search}. "
        f"{_machine(results)}{note} {first.get('note') or ''}"
    ).strip()


def _machine(results: Results) -> str:
    """On which devices, where it was not the CPU alone."""
    rows = [row for group in results.groups for row in group.rows]
    there: dict[str, list[str]] = {}
    for row in rows:
        name = "the CPU" if row.get("device", "cpu") == "cpu" else str(row["conditions"]["gpu"])
        there.setdefault(name, []).append(f"{row['family']} (seed {row['seed']})")
    most = max(there, key=lambda name: len(there[name]))
    if [*there] == ["the CPU"]:
        return ""
    others = (f" On {name}: {', '.join(own)}." for name, own in there.items() if name != most)
    return f"Run on {most}.{''.join(others)} "


def _remarks(folder: Path) -> list[str]:
    """What people add after the runs, if they do: plans cannot change any more."""
    path = folder / "remarks.md"
    if not path.is_file():
        return []
    return ["## Remarks, written after the runs", path.read_text(encoding="utf-8").strip()]


def _findings(found: Sequence[Finding]) -> str:
    rows = [
        [
            f.hypothesis.text,
            f"{f.better} − {f.than}, {_column(f.hypothesis)}",
            f"{f.trials[0]} / {f.trials[1]}",
            f"{f.difference:+.1f}" + (f" ({f.low:+.1f} to {f.high:+.1f})" if f.seeds > 1 else ""),
            f"**{f.verdict}**",
        ]
        for f in found
    ]
    head = ["hypothesis", "compared: best in validation", "trials", "points, paired", "holds"]
    whole = all(f.over_images for f in found)
    over = "seeds and test images" if whole else "seeds, on these very test images"
    return (
        table(head, rows)
        + f"\n\nTrials of either side. Paired intervals over {over}, which hold together at "
        f"95 % (t, Bonferroni) within this table; {VERDICTS}. They are about the chosen settings: "
        "another search may choose others, and how often a training diverges they do not cover."
    )


def _column(hypothesis: Hypothesis) -> str:
    eps = hypothesis.eps
    return hypothesis.column if eps is None else f"{hypothesis.column} {strength(eps)}"


def _accuracy(results: Results, groups: Sequence[Group]) -> str:
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


def _legend(results: Results) -> str:
    attack = results.plan.attack
    done = [row for g in results.groups for row in g.done]
    if not done:
        return "Every network diverged, which counts as 0 %."
    row = done[0]
    # a machine without the package tries fewer
    tried = dict.fromkeys(", ".join(r["worst"][results.eps]["attacks"]) for r in done)
    names = " (or, in other rows, ".join(tried) + ")" * (len(tried) - 1)
    source = f"Transfer: PGD images of a {results.plan.reference} network of another start. "
    transfer = source if attack.transfer else ""
    others = f", none of the {attack.skip} that earlier plans drew" if attack.skip else ""
    return (
        f"Mean ± standard deviation over the seeds; a diverged seed counts as 0 %. Worst: an image "
        f"counts only if {names} all fail ({attack.steps} steps, {attack.queries} queries), on "
        f"{row['images']} test images drawn at random{others}; PGD: 20 steps, two runs, the first "
        f"from the image. {transfer}Norm {attack.norm}. None of these is a certificate."
    )


def _pairs(results: Results) -> str:
    by_side: dict[str, list[Any]] = {}
    for trial in results.trials:
        if 0.0 in trial["clean"]:
            continue
        by_side.setdefault(side(results, results.plan.family(trial["family"])), []).append(trial)
    ours = [name for name in by_side if name.startswith("CondLR")]
    rows = []
    for name in by_side:
        if name in ours:
            continue
        cells = [f"{name} ({len(by_side[name])})"]
        for mine in ours:
            for one, other in ((mine, name), (name, mine)):
                a, b = by_side[one], by_side[other]
                ahead, equal = pairs(*([trial_point(t) for t in side_] for side_ in (a, b)))
                best = pairs(*([trial_point(t) for t in efficient(x, trial_point)] for x in (a, b)))
                cells.append(f"{ahead} of {equal} ({best[0]} of {best[1]})")
        rows.append(cells)
    head = ["rival"]
    for mine in ours:
        head += [
            f"{mine} ({len(by_side[mine])}) as accurate, and ahead",
            f"rival as accurate as {mine}, and ahead",
        ]
    return table(head, rows)


def _left_bars(results: Results) -> str:
    if len(results.plan.search.seeds) > 1:
        return "with standard errors over the seeds of the search"
    return "from one seed, so without error bars"


def _search(results: Results) -> str:
    search = results.plan.search
    rows = []
    for family in results.plan.families:
        trials, best = results.of(family.name), results.best(family.name)
        clean, worst = trial_point(best)
        lost = sum(0.0 in t["clean"] for t in trials)
        rows.append(
            [
                family.name,
                ", ".join(f"{k} {v:g}" for k, v in best["values"].items()),
                "yes" if results.interior(family) else "**no**",
                f"{100 * results.score(best):.1f}",
                f"{100 * clean:.1f}",
                f"{100 * worst:.1f}",
                f"{len(trials)}" + (f" ({lost} diverged)" if lost else ""),
            ]
        )
    head = ["family", "setting", "inside its grid", "score", "clean", "worst", "trials"]
    share, plan_eps = search.robust_share[0], results.plan.attack.eps
    splits = len(search.seeds)
    return table(head, rows) + (
        f"\n\nScore: {1 - share:g} clean + {share:g} worst case at {strength(plan_eps)}, on the "
        f"{100 * search.validation:.0f} % of the training images that a trial does not see (the "
        f"worst case on at most {search.images:,} of them), "
        f"{'one split' if splits == 1 else f'mean over {splits} splits'}. {_tried(results)}"
    )


def _tried(results: Results) -> str:
    count, earlier = results.plan.search.trials, results.plan.earlier
    grid = (
        "the grid grows wherever the search goes (`benchmarks/robustness/search.py`), and the "
        "number of trials is its only limit. Inside its grid: all neighbours of "
    )
    if earlier is None:
        many = f"{count} trial{'s' * (count > 1)}"
        return f"Every family has {many}; {grid}the setting were tried."
    return (
        f"Every family has {count} finalists, the best of its {earlier.search.trials} trials in "
        f"`{earlier.name}`, trained again on other splits; there {grid}that search's best setting "
        "were tried."
    )


def _appendix(results: Results) -> list[str]:
    others = [g for g in results.groups if g not in results.main()]
    parts = []
    if others:
        shares = ", ".join(f"{s:g}" for s in results.plan.search.robust_share[1:])
        parts += [
            f"### Further settings of the frontier\n\nChosen among the same trials by a score "
            "with the "
            f"worst case at weight {shares}.",
            _accuracy(results, others),
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
    full = max(g.done[0]["multiply_adds"] for g in results.main() if g.done)
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
                f"{100 * row['multiply_adds'] / full:.1f} %",
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
        "ran there; of a training that was cut off only what came after. A network that is "
        "truncated and not trained on keeps dense matrices here, so its multiply-adds are those of "
        "a dense one."
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


assert LEAST_SEEDS == 5  # VERDICTS says so
