"""The page of all tables: each planned comparison once, whoever was ahead."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from tiny_plan import TINY
from tiny_results import made, trial, with_difference

from benchmarks.report import overview

AHEAD = [3.0, 3.5, 2.5, 3.2, 2.8]
FORWARD = {**TINY["hypothesis"][0], "than": ["cut"]}
BACKWARD = {**FORWARD, "better": FORWARD["than"], "than": FORWARD["better"]}


def lines(differences=AHEAD, **changes):
    return overview.lines([("tiny", with_difference(differences, **changes))])


def test_a_comparison_says_what_was_expected_and_what_came_out():
    (line,) = lines(hypothesis=[{**FORWARD, "margin": -2.0}])
    table, compared, *found = overview.row(line)
    assert (table, compared) == ("[tiny](tiny/report.md), 40 %", "ours − cut, worst 0.06")
    expected, points, verdict, rest = found
    assert expected == "> −2"
    assert points.startswith("+3.0 (+2.")
    assert (verdict, rest) == ("**yes**", "no / no")


def test_the_picture_shows_ours_ahead_whichever_side_the_hypothesis_names_first():
    one, other = lines(hypothesis=[FORWARD, BACKWARD])
    assert one.label == other.label == "tiny (SGD, τ=0.1, 40 %), 0.06"
    assert one.interval == pytest.approx(other.interval)
    assert one.interval[0] == pytest.approx(3.0)
    assert one.interval[1] < one.interval[0] < one.interval[2]
    assert overview.row(other)[3].startswith("−3.0 (−")


def test_the_picture_draws_each_worst_case_of_five_seeds_once():
    clean = {**FORWARD, "column": "clean"}
    found = lines(hypothesis=[FORWARD, clean, BACKWARD, {**FORWARD, "margin": -2.0}])
    assert len(found) == 4
    assert overview.drawn(found) == found[:1]
    results = with_difference(AHEAD, hypothesis=[FORWARD])
    plan = replace(results.plan, seeds=(*results.plan.seeds, 99))  # a seed is missing
    assert not overview.drawn(overview.lines([("tiny", replace(results, plan=plan))]))
    (few,) = lines(AHEAD[:4])
    assert not overview.drawn([few])
    assert overview.row(few)[4] == "4 seeds"
    (single,) = lines(AHEAD[:1])  # no interval, where "−inf to +inf" stood
    assert overview.row(single)[3:5] == ["+3.0", "1 seed"]
    index = overview.index([("tiny", with_difference(AHEAD[:4]))])
    assert "tiny/report.md" in index
    assert ".png" not in index  # no link to a picture that is not drawn


def test_a_rival_that_never_trained_is_not_drawn_as_beaten():
    results = with_difference(AHEAD, hypothesis=[FORWARD])
    for group in results.groups:
        if group.family.name == "cut":
            for one in group.rows:
                one["diverged"] = True
    (line,) = overview.lines([("tiny", results)])
    assert not overview.drawn([line])
    assert "diverged" in overview.row(line)[4]


def test_a_comparison_of_two_methods_of_ours_is_in_the_table_alone():
    both = {**FORWARD, "better": ["ours"], "than": ["ours"]}
    (line,) = lines(hypothesis=[both])
    assert not overview.drawn([line])


def test_searches_that_came_to_rest_are_told_apart():
    results = with_difference(AHEAD)
    (line,) = overview.lines([("tiny", results)])
    assert line.at_rest == (False, False)
    family = results.plan.family("ours")
    best = results.best("ours")["point"]
    steps = [[(i == k) * s for i in range(len(best))] for k in range(len(best)) for s in (-1, 1)]
    results.trials += [
        {**trial(family, [0.1], [0.1]), "point": [a + b for a, b in zip(best, step, strict=True)]}
        for step in steps
    ]
    (line,) = overview.lines([("tiny", results)])
    assert line.at_rest == (True, False)


def test_the_page_has_lost_comparisons_too_and_a_picture_for_each_kind_of_training():
    losing = [("lost", with_difference([-x for x in AHEAD], hypothesis=[FORWARD]))]
    attacked = {"adversarial": {"eps": 0.1, "kind": "single"}}
    pages = [*losing, ("hard", with_difference(AHEAD, **attacked))]
    text = overview.index(pages)
    assert "| [lost](lost/report.md), 40 % | ours − cut, worst 0.06 | > 0 | −3.0 (" in text
    assert text.index("lost/report.md") < text.index("under-attack.png") < text.index("hard/report")
    drawings = overview.pictures(pages)
    assert list(drawings) == ["as-they-are.png", "under-attack.png"]
    assert all(d.startswith(b"\x89PNG") for d in drawings.values())
    assert list(overview.pictures(losing)) == ["as-they-are.png"]


def test_every_rival_has_a_place_in_the_picture():
    accuracies = {name: [0.5] * 5 for name in ("dense", "cut", "wild", "ours")}
    names = [f.name for f in made(accuracies).plan.families if not f.ours]
    hypotheses = [{**FORWARD, "than": [name]} for name in names]
    found = overview.lines([("tiny", made(accuracies, hypothesis=hypotheses))])
    assert len(overview.drawn(found)) == len(names)
