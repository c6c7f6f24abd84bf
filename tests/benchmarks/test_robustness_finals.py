"""Finals: the best settings of a finished search are trained again before one is chosen."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
from tiny_plan import TINY, changed, write

from benchmarks.report import overview, page
from benchmarks.report.results import read
from benchmarks.robustness import plan as plans
from benchmarks.robustness.plan import PlanError
from benchmarks.robustness.runner import Runner, scored
from benchmarks.robustness.table import Table

ATTACK = {"condition_images": 0, "transfer": [], "worst_l2": [], "fgsm": []}
FEW = {"family": TINY["family"][:3:2], "attack": ATTACK, "seeds": [0]}  # dense and ours
FEW["hypothesis"] = [{"text": "Ours.", "better": ["ours"], "than": ["dense"]}]
FINALS = {"finals_of": "tiny", "trials": 2, "seeds": [101, 102], "robust_share": [0.5]}


def runner(folder, name):
    return Runner(folder / name, folder / "scratch", unregistered=True, log=lambda _: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finals")
    write(folder / "tiny", changed(**FEW))
    write(folder / "finals", changed(**FEW, search=FINALS))
    with pytest.raises(PlanError, match=r"dense has 0 of 4 trials there; first run .* tiny"):
        runner(folder, "finals").go()
    assert runner(folder, "tiny").go()
    assert runner(folder, "finals").go()
    return folder


def trials(folder, name, family):
    rows = Table(folder / name / "trials.jsonl").rows()
    return [row for row in rows if row["family"] == family]


@pytest.mark.parametrize("family", ["dense", "ours"])
def test_the_best_of_the_search_are_trained_again_and_the_best_of_these_is_chosen(finished, family):
    before = sorted(trials(finished, "tiny", family), key=lambda row: -scored(row, 0.5))
    again = trials(finished, "finals", family)
    assert [row["point"] for row in again] == [row["point"] for row in before[:2]]
    assert [row["values"] for row in again] == [row["values"] for row in before[:2]]
    assert all(len(row["clean"]) == 2 for row in again)  # one for each seed of the finals
    best = max(again, key=lambda row: scored(row, 0.5))
    (row,) = [r for r in Table(finished / "finals/runs.jsonl").rows() if r["family"] == family]
    assert row["values"] == best["values"]


def test_the_best_of_the_search_need_not_win_its_finals(finished, tmp_path):
    for name in ("tiny", "finals"):
        shutil.copytree(finished / name, tmp_path / name)
    (tmp_path / "finals/runs.jsonl").unlink()
    table = Table(tmp_path / "finals/trials.jsonl")
    first, second = trials(tmp_path, "finals", "dense")
    table.append({**first, "worst": [0.1, 0.1]})
    table.append({**second, "worst": [0.9, 0.9]})
    work = runner(tmp_path, "finals")
    assert work.chosen(work.plan.family("dense")) == [(second["values"], [0.5])]


def test_the_page_says_what_the_finals_are_of_and_whether_that_search_came_to_rest(finished):
    results = read(finished / "finals")
    family = results.plan.family("ours")
    text = page._search(results)
    assert "2 finalists, the best of its 4 trials in `tiny`" in text
    assert "mean over 2 splits" in text
    # one that was not at rest there is not made so by its finals, and the other way round
    assert not results.interior(family)
    best = max(results.earlier, key=lambda t: (t["family"] == "ours") * results.score(t))
    for i, k in ((0, 1), (0, -1), (1, 1), (1, -1), (2, 1), (2, -1)):
        point = [*best["point"]]
        point[i] += k
        results.earlier = [*results.earlier, {**best, "point": point, "worst": [0.0]}]
    assert results.interior(family)
    assert [line.at_rest for line in overview.lines([("finals", results)])] == [(True, False)]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"training": {"epochs": 3}}, "not the same there: training"),
        ({"network": {"samples": 200}}, "not the same there: network"),
        ({"attack": {**ATTACK, "eps": 0.1}}, "eps and norm of attack"),
        ({"axes": {"lr": {"factor": 3}}}, "not the same there: axes"),
        ({"adversarial": {"eps": 0.1}}, "not the same there: adversarial"),
        ({"family": [TINY["family"][0], {**TINY["family"][2], "tau": 0.2}]}, "there: ours"),
        ({"search": {**FINALS, "seeds": [100, 101]}}, r"seeds \[100\] in both"),
        ({"search": {**FINALS, "trials": 5}}, "at least 5 trials"),
        ({"search": {**FINALS, "finals_of": "finals"}}, "no finals, got finals of 2 trials"),
        ({"search": {**FINALS, "finals_of": "nowhere"}}, "nowhere"),
    ],
)
def test_finals_of_another_question_are_refused(finished, tmp_path, change, word):
    shutil.copytree(finished / "tiny", tmp_path / "tiny")
    shutil.copytree(finished / "finals", tmp_path / "finals")
    with pytest.raises(PlanError, match=word):
        plans.load(write(tmp_path / "wrong", changed(**{**FEW, "search": FINALS, **change})))


def test_finals_belong_to_one_search(finished, tmp_path):
    """Another text of the earlier plan is another search: rows of before do not count."""
    before = plans.load(finished / "finals/plan.toml").digest
    raw = changed(**FEW, search=FINALS)
    for name, title in (("same", "Tiny"), ("other", "Tiny, again")):
        write(tmp_path / name / "tiny", changed(**FEW, title=title))
        digest = plans.load(write(tmp_path / name / "finals", raw)).digest
        assert (digest == before) == (name == "same")


@pytest.mark.parametrize("key", ["name", "digest", "earlier"])
def test_what_follows_from_the_rest_is_no_field_of_a_plan(tmp_path, key):
    with pytest.raises(PlanError, match=key):
        plans.load(write(tmp_path / "tiny", {**changed(**FEW), key: "tiny"}))
