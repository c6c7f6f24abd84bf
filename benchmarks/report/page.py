"""A table's page in Markdown: what was expected, what came out, everything else below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrmanifold.experiments.runs import write_atomically

from ..robustness.plan import Hypothesis
from . import appendix, conditioning
from .cells import accuracy, table
from .picture import SHOWN, curves, frontier, side
from .results import (
    LEAST_SEEDS,
    Finding,
    Results,
    efficient,
    findings,
    pairs,
    strength,
    trial_point,
)

VERDICTS = "yes / no only where the whole interval lies on one side, from five seeds or more"


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
        accuracy(results, sorted(results.main(), key=lambda g: -g.mean(*results.column("worst")))),
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
        *appendix.sections(results),
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


assert LEAST_SEEDS == 5  # VERDICTS says so
