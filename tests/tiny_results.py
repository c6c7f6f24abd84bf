"""Results of the tiny plan with accuracies that a test chooses."""

from __future__ import annotations

from tiny_plan import changed

from benchmarks.report.results import Group, Results
from benchmarks.robustness.plan import parse

SEEDS = [0, 1, 2, 3, 4]


def trial(family, clean, worst, *, lr=0.1, k=0):
    values = {**family.start, "lr": lr}
    point = [k] + [0] * (len(values) - 1)
    return {
        "family": family.name, "values": values, "point": point, "clean": clean, "worst": worst,
    }  # fmt: skip


def row(family, seed, clean, worst, **more):
    return {
        "family": family.name, "seed": seed, "values": dict(family.start), "shares": [0.5, 0.0],
        "clean": {"accuracy": clean}, "worst": {"0.06": {"accuracy": worst}}, "stored_share": 0.4,
        **more,
    }  # fmt: skip


def made(accuracies, seeds=SEEDS, **changes):
    """Results with worst-case accuracies by family, one for each seed."""
    plan = parse(changed(seeds=list(seeds), **changes), "tiny")
    trials = [trial(f, [0.9], [0.5]) for f in plan.families]
    groups = [
        Group(f, [row(f, s, 0.9, a) for s, a in zip(seeds, accuracies[f.name], strict=True)])
        for f in plan.families
    ]
    return Results(plan, trials, groups)


def with_difference(d, **changes):
    base = {name: [0.5] * len(d) for name in ("dense", "cut", "wild")}
    seeds = range(len(d))
    return made({**base, "ours": [0.5 + x / 100 for x in d]}, seeds=seeds, **changes)
