"""The report of a plan: what rows say together; every word of it can come out otherwise."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from hypothesis import given
from hypothesis import strategies as st
from tiny_plan import START, TINY, changed, write
from tiny_results import SEEDS, made, row, trial, with_difference

from benchmarks._record import FOLDER
from benchmarks.report import appendix, cells, overview, page, picture, published
from benchmarks.report.results import (
    LEAST_SEEDS,
    efficient,
    findings,
    half_width,
    pairs,
    read,
    strength,
    trial_point,
)
from benchmarks.robustness.measures import packed, unpacked
from benchmarks.robustness.plan import PlanError, load, parse


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([3.0, 3.5, 2.5, 3.2, 2.8], "yes"),
        ([-3.0, -3.5, -2.5, -3.2, -2.8], "no"),
        ([3.0, -3.5, 6.0, 3.2, -2.8], "not decided"),
        ([0.1, 9.0, 0.2, 8.0, 0.1], "not decided"),  # positive in each seed, too wide
        ([3.0, 3.5, 2.5, 3.2], "no verdict from 4 seeds"),
    ],
)
def test_verdicts_come_from_five_seeds_and_the_whole_interval(differences, verdict):
    (found,) = findings(with_difference(differences))
    assert found.verdict == verdict
    assert found.difference == pytest.approx(np.mean(differences))
    assert LEAST_SEEDS == 5


def test_the_margin_moves_the_verdict():
    hypothesis = {**TINY["hypothesis"][0], "margin": -5.0}
    (found,) = findings(with_difference([-3.0, -3.5, -2.5, -3.2, -2.8], hypothesis=[hypothesis]))
    assert found.verdict == "yes"


def test_a_hypothesis_may_be_about_another_strength():
    hypothesis = {**TINY["hypothesis"][0], "eps": 0.12}
    attack = {**TINY["attack"], "worst": [0.12]}
    results = with_difference(
        [-3.0, -3.5, -2.5, -3.2, -2.8], hypothesis=[hypothesis], attack=attack
    )
    for group in results.groups:
        for one in group.rows:
            one["worst"]["0.12"] = {"accuracy": 1 - one["worst"]["0.06"]["accuracy"]}
    (found,) = findings(results)
    assert (found.verdict, found.difference) == ("yes", pytest.approx(3.0))
    assert "worst 0.12" in page._findings([found])


def test_more_hypotheses_make_wider_intervals():
    one = TINY["hypothesis"][0]
    widths = []
    for count in (1, 4):
        found = findings(with_difference([3.0, 3.5, 2.5, 3.2, 2.8], hypothesis=[one] * count))
        widths.append(found[0].high - found[0].low)
    assert widths[1] > 1.3 * widths[0]


def test_the_interval_covers_as_often_as_it_says():
    """Monte Carlo: 95 % of intervals of five normal numbers hold the mean."""
    generator = np.random.default_rng(0)
    draws = generator.normal(size=(4000, 5))
    held = [abs(d.mean()) <= half_width(d[:, None], 0.05) for d in draws]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


def test_the_interval_covers_other_test_images_too():
    """Monte Carlo: networks and images drawn anew; seeds alone would promise far too much."""
    generator = np.random.default_rng(1)
    held, by_seeds = [], []
    for _ in range(1000):
        seeds, images = generator.normal(0, 1, (5, 1)), generator.normal(0, 30, (1, 200))
        d = seeds + images + generator.normal(0, 20, (5, 200))
        held.append(abs(d.mean()) <= half_width(d, 0.05))
        by_seeds.append(abs(d.mean()) <= half_width(d.mean(1, keepdims=True), 0.05))
    assert 0.94 <= np.mean(held) <= 0.99
    assert np.mean(by_seeds) < 0.8


def test_the_interval_covers_where_the_seeds_differ_most():
    """Monte Carlo at the 99 % of one of five hypotheses: Satterthwaite alone misses 1.7 %."""
    generator = np.random.default_rng(3)
    draws = generator.normal(0, 300, (10_000, 5, 1)) + generator.normal(0, 330, (10_000, 1, 30))
    missed = [abs(d.mean()) > half_width(d, 0.01) for d in draws]
    assert np.mean(missed) < 0.014


@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_an_interval_about_more_is_never_narrower(seeds, images, seed):
    d = np.random.default_rng(seed).integers(-1, 2, (seeds, images))
    over_seeds = half_width(d.mean(1, keepdims=True), 0.01)
    assert half_width(d, 0.01) >= over_seeds or math.isclose(half_width(d, 0.01), over_seeds)


@pytest.mark.parametrize(("won", "lost"), [(0.0, 0.006), (0.0, 0.011), (0.003, 0.014)])
def test_few_images_that_differ_do_not_prove_that_few_others_do(won, lost):
    """Monte Carlo: of all images so many are won and lost; of 355 often fewer, or none."""
    generator = np.random.default_rng(4)
    drawn = generator.random((2000, 1, 355))
    d = 100.0 * ((drawn < won).astype(float) - (drawn > 1 - lost))
    above = [one.mean() - half_width(np.repeat(one, 10, 0), 0.01) > 100 * (won - lost) for one in d]
    assert np.mean(above) < 0.012  # 0.04 to 0.11 by the t interval alone


@pytest.mark.parametrize("marked", [True, False])
def test_rows_that_keep_their_images_give_the_wider_interval(marked):
    """The same accuracies: once as counts alone, once with the images that stand."""
    generator = np.random.default_rng(2)
    results = with_difference([3.0, 3.5, 2.5, 3.2, 2.8])
    for group in results.groups:
        for one in group.rows:
            mask = generator.random(100) < one["worst"]["0.06"]["accuracy"]
            one["worst"]["0.06"]["accuracy"] = float(mask.mean())
            if marked:
                one |= {"images": 100}
                one["worst"]["0.06"]["robust"] = packed(torch.from_numpy(mask))
    (found,) = findings(results)
    assert found.over_images == marked
    ours, dense = (
        results.speaks([name]).mean("worst", "0.06", "accuracy") for name in ("ours", "dense")
    )
    assert found.difference == pytest.approx(100 * (ours - dense))
    text = page._findings([found])
    assert "test images" in text
    assert ("very test images" in text) != marked


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (2 / 255, "2/255"),
        (0.00784313725490196, "2/255"),
        (0.1, "0.1"),
        (0.2, "0.2"),
        (0.002, "0.002"),
    ],
)
def test_strengths_are_named_as_people_name_them(eps, text):
    assert strength(eps) == text


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_which_images_stand_is_read_as_it_was_written(mask):
    assert unpacked(packed(torch.tensor(mask)), len(mask)).tolist() == mask


def test_a_diverged_seed_counts_as_zero():
    results = made({name: [0.5] * 5 for name in ("dense", "cut", "ours", "wild")})
    group = next(g for g in results.groups if g.family.name == "ours")
    group.rows[2] = {**group.rows[2], "diverged": True}
    assert group.mean("worst", "0.06", "accuracy") == pytest.approx(0.4)
    assert len(group.done) == 4
    assert "5 (1 diverged)" in cells.accuracy(results, [group])


@pytest.mark.parametrize(
    ("lost", "verdict"),
    [
        (("ours", "dense"), "no verdict, dense diverged in every seed"),
        (("dense",), "no verdict, dense diverged in every seed"),
        (("ours",), "no"),
        ((), "yes"),
    ],
)
def test_nobody_is_close_to_a_network_that_never_trained(lost, verdict):
    """Two families at 0 % in every seed are at most three points apart, and tell nothing."""
    hypothesis = {"text": "", "better": ["ours"], "than": ["dense"], "margin": -3.0}
    names = ("dense", "cut", "ours", "wild")
    results = made({name: [0.5] * 5 for name in names}, hypothesis=[hypothesis])
    for group in results.groups:
        if group.family.name in lost:
            group.rows = [one | {"diverged": True} for one in group.rows]
    (found,) = findings(results)
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("clean", "lost", "verdict"),
    [
        (0.114, 0, "no verdict, dense was at chance in every seed"),
        (0.114, 2, "no verdict, dense diverged or was at chance in every seed"),
        (0.6, 2, "yes"),
    ],
)
def test_nobody_is_close_to_a_network_that_stayed_at_chance(clean, lost, verdict):
    hypothesis = {"text": "", "better": ["ours"], "than": ["dense"], "margin": -3.0}
    names = ("dense", "cut", "ours", "wild")
    results = made({name: [0.1] * 5 for name in names}, hypothesis=[hypothesis])
    dense = next(g for g in results.groups if g.family.name == "dense")
    dense.rows = [
        {**one, "clean": {"accuracy": clean}, "diverged": k < lost}
        for k, one in enumerate(dense.rows)
    ]
    (found,) = findings(results)
    assert found.verdict == verdict
    assert ("at chance" in cells.accuracy(results, [dense])) == (clean < 0.5)


def test_sizes_are_sides_of_their_own():
    """A rival of another size is no rival: only `ours` has ranks of its own here."""
    results = made({name: [0.5] * 5 for name in ("dense", "cut", "ours", "wild")})
    for group in results.groups:
        for one in group.rows:
            one["stored_share"] = 0.25 if group.family.name == "ours" else 0.5
    sides = {f.name: picture.side(results, f) for f in results.plan.families}
    assert sides == {
        "dense": "dense", "cut": "truncated, 50 %", "ours": "CondLR, 25 %", "wild": "A Bᵀ, 50 %",
    }  # fmt: skip


def test_a_method_has_one_colour_and_a_size_one_marker(monkeypatch):
    """More sides than colours: the pictures tell them apart all the same."""
    dense, cut, ours, wild = TINY["family"]
    small = {"cut": cut, "ours": ours, "wild": {**wild, "start": START}}
    families = [dense] + [
        {**family, "name": f"{name} {share}", "ranks": {"fc1": share, "fc2": share}}
        for share in (50, 25, 10)
        for name, family in small.items()
    ]
    hypothesis = [{"text": "Harder.", "better": ["ours 10"], "than": ["cut 10"]}]
    accuracies = {family["name"]: [0.5] * 5 for family in families}
    results = made(accuracies, family=families, hypothesis=hypothesis)
    for group in results.groups:
        for one in group.rows:
            one["pgd"] = {"0.06": 0.5}
            one["stored_share"] = float(f"0.{group.family.name[-2:]}") if group.family.ranks else 1
    drawn = picture.looks(results)
    pairs = {(look["color"], look["marker"]) for look in drawn.values()}
    assert len(pairs) == len(drawn) == 10
    for i, key in enumerate(("color", "marker")):
        by_word = {}
        for name, look in drawn.items():
            by_word.setdefault(name.split(", ")[i] if ", " in name else name, set()).add(look[key])
        assert all(len(found) == 1 for found in by_word.values()), by_word
    figures = []
    monkeypatch.setattr(picture, "png", figures.append)
    picture.curves(results)
    assert [a.get_title() for a in figures[0].axes] == [
        f"PGD, digits, {share} % of the weights" for share in (50, 25, 10)
    ]
    for axis in figures[0].axes:
        assert [line.get_label() for line in axis.get_lines()] == [
            "dense", "truncated", "CondLR", "A Bᵀ"
        ]  # fmt: skip


def test_validation_decides_which_family_speaks():
    """Not the test images: `cut` is better there, `dense` in validation."""
    results = made({"dense": [0.3] * 5, "cut": [0.6] * 5, "ours": [0.5] * 5, "wild": [0.0] * 5})
    results.trials[0]["worst"] = [0.8]
    assert results.speaks(["dense", "cut"]).family.name == "dense"
    results.trials[1]["worst"] = [0.9]
    assert results.speaks(["dense", "cut"]).family.name == "cut"


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(points)
def test_efficient_points_are_those_that_nothing_beats(found):
    kept = efficient(found, lambda p: p)
    for p in found:
        beaten = any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in found)
        assert (p in kept) != beaten


@pytest.mark.parametrize("behind", [0.85, 0.5])
def test_the_frontier_is_shown_whole_but_for_what_learned_little(behind, monkeypatch):
    results = made({name: [0.5] * 5 for name in ("dense", "cut", "ours", "wild")})
    last = results.trials[-1]
    results.trials += [dict(last), dict(last)]
    below = ((0, 0), (-0.14, 0.1), (-0.16, 0.2))
    for one, (clean, worst) in zip(results.trials[-3:], below, strict=True):
        one["clean"], one["worst"] = [behind + clean], [0.3 + worst]
    drawn = []
    monkeypatch.setattr(picture, "png", drawn.append)
    picture.frontier(results)
    axis = drawn[0].axes[0]
    (low, high), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    lines = [np.asarray(c.lines[0].get_xydata()) for c in axis.containers]
    assert all(((low, bottom) < xy).all() and (xy < (high, top)).all() for xy in lines)
    # of a side far behind the same is shown, and no line leads to what is left out
    expected = [[100 * behind - 14, 40], [100 * behind, 30]]
    assert any(len(xy) == 2 and np.allclose(xy[xy[:, 0].argsort()], expected) for xy in lines)


def test_pairs_are_counted_by_hand():
    ours = [(0.90, 0.5), (0.80, 0.9)]
    theirs = [(0.9005, 0.4), (0.85, 0.6), (0.70, 0.7)]
    # as accurate: the first with all three (0.05 points less counts), the second with the last
    assert pairs(ours, theirs) == (2, 4)
    assert pairs(theirs, ours) == (0, 3)


def counts(of):
    """Accuracies of a trial as rows hold them, each a count of right images of 434."""
    return [float(f"{count / 434:.6g}") for count in of]


@given(st.lists(st.tuples(*[st.integers(250, 256)] * 4), min_size=1, max_size=8))
def test_as_many_images_are_a_tie_however_they_are_split(found):
    """Against whole numbers: a pair is counted, and a setting kept, by numbers of images."""
    trials = [{"clean": counts(four[:2]), "worst": counts(four[2:])} for four in found]
    at = [trial_point(t) for t in trials]
    whole = [(sum(four[:2]), sum(four[2:])) for four in found]
    equal = [(a, b) for a in whole for b in whole if 1000 * (b[0] - a[0]) <= 868]
    assert pairs(at, at) == (sum(a[1] > b[1] for a, b in equal), len(equal))
    kept = efficient(range(len(at)), lambda k: at[k])
    best = efficient(range(len(at)), lambda k: whole[k])
    assert [whole[k] for k in kept] == [whole[k] for k in best]


# ---------------------------------------------------------------------------------- from files


@pytest.fixture
def folder(tmp_path):
    raw = changed(seeds=SEEDS)
    path = write(tmp_path / "tiny", raw)
    plan = parse(raw, "tiny")
    extra = {
        "plan": None, "plan_commit": "abc1234", "stored_share": 0.4, "trained_share": 0.5,
        "multiply_adds": 10, "train_cpu_seconds": 1.0, "images": 20, "cond": [], "loss": [1.0],
        "layers": {"fc1": {"cond": 1.1}}, "pgd": {"0.06": 0.5}, "fgsm": {"0.06": 0.6},
        "transfer": {"0.1": 0.7}, "note": "", "conditions": {"commit": "def5678"},
    }  # fmt: skip
    extra["plan"] = load(path).digest
    with open(path.parent / "trials.jsonl", "w") as file:
        for family in plan.families:
            for k in range(3):
                lr = family.start["lr"] * 2**k  # the first is the best
                line = trial(family, [0.8 + 0.05 * k], [0.5 - 0.1 * k], lr=lr, k=k)
                key = f"{family.name}{k}"
                file.write(json.dumps({**line, "plan": extra["plan"], "key": key}) + "\n")
    with open(path.parent / "runs.jsonl", "w") as file:
        for i, family in enumerate(plan.families):
            for seed in SEEDS:
                line = row(family, seed, 0.9, 0.5 + 0.05 * i + 0.001 * seed, **extra)
                line["worst"]["0.06"] |= {"after": {"pgd": 0.5}, "attacks": ["pgd"]}
                line["clean"]["ece"] = 0.01
                file.write(json.dumps({**line, "key": f"{family.name}{seed}"}) + "\n")
    return path.parent


def test_the_page_says_everything(folder):
    results = read(folder)
    text = page.write(results, folder).read_text()
    for name in ("frontier", "pgd"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for word in (
        "# Tiny", "`abc1234`", "Smaller is harder.", "| ours − ", "**yes**", "pgd all fail",
        "Inside its grid", "`def5678`", "| 3 / 6 |", "another start",
        "0.5 clean + 0.5 worst case", "3 |",
    ):  # fmt: skip
        assert word in text, word
    assert "**yes**" in overview.index([("tiny", results)])


def test_remarks_after_the_runs_stand_on_the_page(folder):
    assert "after the runs" not in page.write(read(folder), folder).read_text()
    (folder / "remarks.md").write_text("- Too short.\n")
    text = page.write(read(folder), folder).read_text()
    assert "## Remarks, written after the runs\n\n- Too short.\n\n## The chosen" in text


def without(folder, keep):
    lines = (folder / "runs.jsonl").read_text().splitlines()
    kept = [line for line in lines if keep(json.loads(line))]
    (folder / "runs.jsonl").write_text("".join(f"{line}\n" for line in kept))


def test_a_table_without_a_family_has_no_page(folder):
    without(folder, lambda row: row["family"] != "cut")
    assert read(folder) is None


def test_a_family_without_one_of_its_chosen_settings_is_not_there(folder):
    """A run that was cut off between two settings of a family: neither is shown as all."""
    path = folder / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for missing, found in (("wild", ("wild",)), ("cut", None)):
        with open(path, "w") as file:
            for one in rows:
                shares = [0.5] if one["family"] == missing else one["shares"]
                file.write(json.dumps({**one, "shares": shares}) + "\n")
        results = read(folder)
        assert (results and results.missing) == found


def test_a_page_of_networks_that_all_diverged_says_so(folder):
    results = read(folder)
    for group in results.groups:
        group.rows = [one | {"diverged": True} for one in group.rows]
    text = page.write(results, folder).read_text()
    assert "Every network diverged" in text
    assert "**no verdict, dense diverged in every seed**" in text


@pytest.mark.parametrize(("kept", "cell"), [(1, "70.0 (1 of 5)"), (3, "70.0 ± 0.0 (3 of 5)")])
def test_a_mean_over_fewer_seeds_says_over_how_many(folder, kept, cell):
    """The network that transfer takes its images from diverged in the other seeds."""
    group = read(folder).main()[0]
    for one in group.rows[kept:]:
        del one["transfer"]
    assert cells.percent(group, "transfer", "0.1") == cell


def test_seeds_that_not_all_families_have_are_left_out_and_told(folder):
    without(folder, lambda row: row["seed"] < 3 or (row["family"], row["seed"]) == ("dense", 3))
    results = read(folder)
    assert results.seeds == [0, 1, 2]
    assert all([row["seed"] for row in g.rows] == [0, 1, 2] for g in results.groups)
    text = page.write(results, folder).read_text()
    assert "2 of the 5 planned seeds are not finished" in text
    assert "Seed 3 has 1 of 4 rows" in text
    assert "no verdict from 3 seeds" in text
    without(folder, lambda row: (row["family"], row["seed"]) == ("dense", 0))
    assert read(folder) is None


def test_the_first_seed_is_that_of_the_plan_in_whatever_order_rows_were_finished(folder):
    expected = page.write(read(folder), folder).read_text()
    lines = (folder / "runs.jsonl").read_text().splitlines()
    (folder / "runs.jsonl").write_text("".join(f"{line}\n" for line in reversed(lines)))
    results = read(folder)
    assert all([row["seed"] for row in g.rows] == list(SEEDS) for g in results.groups)
    assert sorted(page.write(results, folder).read_text()) == sorted(expected)


def test_a_verdict_before_the_last_seed_says_so(folder):
    """Or the first yes would end the runs."""
    write(folder, changed(seeds=[*SEEDS, 5, 6]))
    digest = load(folder / "plan.toml").digest
    for name in ("trials", "runs"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**one, "plan": digest}) + "\n" for one in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    results = read(folder)
    (found,) = findings(results)
    assert found.verdict == "yes so far, 5 of 7 seeds"
    assert "**yes so far, 5 of 7 seeds**" in overview.index([("tiny", results)])


@pytest.mark.parametrize("first", [True, False])
def test_rows_of_two_searches_are_refused(folder, first):
    """Another machine's search chose another setting: that of the first row would speak."""
    lines = (folder / "runs.jsonl").read_text().splitlines()
    own = [json.loads(line) for line in lines if json.loads(line)["family"] == "dense"]
    other = [
        json.dumps({**one, "key": f"other {one['key']}", "values": {**one["values"], "lr": 0.2}})
        for one in own
    ]
    both = [*other, *lines] if first else [*lines, *other]
    (folder / "runs.jsonl").write_text("".join(f"{line}\n" for line in both))
    with pytest.raises(PlanError, match=r"rows of dense have .*0\.2.*, its trials chose .*0\.1"):
        read(folder)


def test_more_trials_than_planned_are_refused(folder):
    path = folder / "trials.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    more = [json.dumps({**line, "key": f"more {k}"}) + "\n" for k in range(2)]
    path.write_text(path.read_text() + "".join(more))
    with pytest.raises(PlanError, match="tiny: dense has 5 trials where the plan has 4"):
        read(folder)


def test_rows_of_an_earlier_plan_do_not_count(folder):
    write(folder, changed(seeds=SEEDS, title="Changed after the runs"))
    assert read(folder) is None


def test_calibration_and_seconds_are_of_trainings_that_went_through(folder):
    """A diverged seed is not perfectly calibrated; the rest of a training that was cut off is no
    whole one."""
    results = read(folder)
    first, second, *_ = results.main()[0].rows
    first |= {"diverged": True}
    second |= {"train_cpu_seconds": 0.01}
    line = next(x for x in appendix._cost(results).splitlines() if x.startswith("| dense |"))
    assert line.endswith("| 1.0 ± 0.0 | 1.0 |")


def test_tables_of_the_first_seed_say_whose_diverged(folder):
    results = read(folder)
    for group in results.groups:
        group.rows[0]["masking"] = {
            "failed": [], "one_step": 0.5, "many_steps": 0.4, "black_box": {"250": 0.5},
            "only_black_box": 0.0, "unlimited": 0.0,
        }  # fmt: skip
    assert "The first seed" not in "".join(appendix.sections(results))
    next(g for g in results.main() if g.family.name == "cut").rows[0] = {
        "family": "cut", "seed": 0, "diverged": True, "shares": [0.5, 0.0],
    }  # fmt: skip
    parts = appendix.sections(results)
    said = [part for part in parts if part.startswith("The first seed of cut diverged: ")]
    assert len(said) == 2
    masking = next(i for i, part in enumerate(parts) if part.startswith("| family | one step"))
    assert parts[masking + 1].endswith("it is not in this table.")


def test_the_page_says_how_many_trials_each_side_had(folder):
    text = page._pairs(read(folder))
    assert "| truncated, 40 % (3) |" in text
    assert "CondLR, 40 % (3) as accurate" in text


def test_bars_that_one_seed_cannot_have_are_not_promised(folder):
    results = read(folder)
    text = page.write(results, folder).read_text()
    assert "from one seed, so without error bars" in text
    assert "one split" in text


def test_rows_that_were_attacked_less_are_told(folder):
    """A machine without pyautoattack: its rows are under PGD alone, and keep standing so."""
    results = read(folder)
    last = results.groups[-1]
    for group in results.groups:
        if group is not last:
            for one in group.rows:
                found = one["worst"]["0.06"]
                found |= {"after": {"pgd": 0.5, "square": 0.4}, "attacks": ["pgd", "square"]}
    assert "only if pgd, square (or, in other rows, pgd) all fail" in page._legend(results)
    lines = appendix._after(results).splitlines()
    assert lines[2].endswith("| 50.0 | 40.0 |")
    assert lines[-1] == f"| {last.family.name} | 50.0 | – |"


def test_a_setting_at_an_end_of_its_grid_is_marked(folder):
    results = read(folder)
    # nothing of decay and smoothing was tried: no setting has all its neighbours
    assert not any(results.interior(f) for f in results.plan.families)
    assert page._search(results).count("**no**") == len(results.plan.families)
    family = results.plan.families[0]
    best = results.best(family.name)
    around = [
        {**trial(family, [0.1], [0.1]), "point": [best["point"][0] + a, b, c]}
        for a, b, c in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    results.trials = [*results.trials, *around]
    assert family.start == START
    assert results.interior(family)


def test_the_pages_that_are_committed_are_what_the_program_writes(tmp_path, monkeypatch):
    for drawn in ("frontier", "curves"):
        monkeypatch.setattr(page, drawn, lambda _: b"")
    pages = []
    for plan in sorted((FOLDER / "robustness").glob("*/plan.toml")):
        results = read(plan.parent)
        if results is None:
            continue
        pages.append((plan.parent.name, results))
        folder = tmp_path / plan.parent.name
        folder.mkdir()
        for name in ("conditioning.json", "remarks.md"):
            if (beside := plan.parent / name).is_file():
                shutil.copy(beside, folder)
        written = page.write(results, folder).read_text(encoding="utf-8")
        assert written == (plan.parent / "report.md").read_text(encoding="utf-8")
    assert len(pages) >= 5
    index = (FOLDER / "robustness" / "report.md").read_text(encoding="utf-8")
    assert overview.index(pages) == index


def test_published_lines_stand_alone():
    assert published.of("digits") is None
    for data in ("mnist", "fashion-mnist", "cifar10"):
        strengths, lines, note = published.of(data)
        assert note
        assert all(len(line.accuracy) == len(strengths) for line in lines)
        assert all(0 < a < 100 and math.isfinite(a) for line in lines for a in line.accuracy)
