"""The robustness benchmark: plans parse, settings are chosen fairly, a killed run goes on."""

from __future__ import annotations

import math
import random
import subprocess
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
from hypothesis import given
from hypothesis import strategies as st
from tiny_plan import START, TINY, changed, write
from torch.nn.utils.parametrize import is_parametrized

import lrmanifold as lrm
from benchmarks import models
from benchmarks._record import FOLDER
from benchmarks.robustness import measures
from benchmarks.robustness import plan as plans
from benchmarks.robustness.plan import PlanError, parse, registered
from benchmarks.robustness.runner import Runner, scored
from benchmarks.robustness.search import Axis, Ladder, ranked, search
from benchmarks.robustness.table import Table
from lrmanifold import robustness
from lrmanifold.experiments.data import Dataset, load
from lrmanifold.experiments.factors import two_factors
from lrmanifold.experiments.orthogonal import orthogonalize
from lrmanifold.nn import LowRankLayer


def runner(folder, raw=TINY, **options):
    write(folder / "tiny", raw)
    options = {"unregistered": True, "log": lambda _: None, **options}
    return Runner(folder / "tiny", folder / "scratch", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    assert runner(folder).go()
    return folder


# ------------------------------------------------------------------------------------- plans


# Fewer than 12 trials a family, for lack of compute; their notes say so.
REDUCED = {
    "cifar10-adversarial",
    "cifar10-half",
    "cifar10-half-rivals",
    "cifar10-longer",
    "cifar10-mean-norm",
    "cifar10-no-norm",
    "cifar10-recipe",
    "cifar10-wide",
    "fashion-mnist",
    "fashion-mnist-adversarial",
    "fashion-mnist-beyond",
    "fashion-mnist-tenth",
    "mnist",
    "mnist-beyond",
    "mnist-orthogonal",
    "cifar10",
    "mnist-adversarial",
}


def test_every_plan_of_the_results_parses_and_its_network_converts():
    found = sorted((FOLDER / "robustness").glob("*/plan.toml"))
    assert found
    for path in found:
        plan = plans.load(path)
        named = {f.model or plan.network.model for f in plan.families}
        assert named <= set(models.NAMES)
        assert len(plan.seeds) >= 3
        assert plan.hypotheses
        first = plan.earlier or plan
        assert first.search.trials >= 12 or plan.name in REDUCED


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"training": {"epoch": 3}}, "epoch"),
        ({"network": {"depth": 3}}, "depth"),
        ({"family": [{"name": "a", "kind": "magic", "start": START}]}, "magic"),
        ({"family": [{"name": "a", "kind": "dense", "tau": 0.1, "start": START}]}, "tau must be"),
        ({"family": [{"name": "a", "kind": "dense", "start": {"lr": 0.1}}]}, "start"),
        ({"family": [TINY["family"][0]] * 2}, "different"),
        ({"reference": "nobody"}, "nobody"),
        ({"hypothesis": [{"text": "", "better": ["dense"], "than": ["me"]}]}, "me"),
        ({"hypothesis": [{**TINY["hypothesis"][0], "column": "fgsm"}]}, "fgsm"),
        ({"hypothesis": [{**TINY["hypothesis"][0], "eps": 0.3}]}, "one of worst"),
        ({"seeds": [0, 1, 0]}, "seeds"),
        ({"search": {"seeds": []}}, "seeds of the search"),
        ({"search": {"robust_share": []}}, "share"),
        ({"search": {"trials": 0}}, "trials"),
        ({"attack": {"norm": "L2"}}, "L2"),
        ({"attack": {"skip": -3}}, "skip"),
        ({"axes": {"lr": {"factor": 1}}}, "factor"),
    ],
)
def test_what_is_wrong_in_a_plan_is_named(change, word, tmp_path):
    with pytest.raises(PlanError, match=word):
        plans.load(write(tmp_path / "wrong", changed(**change)))


@pytest.mark.parametrize(("decay", "end"), [(0.005, "; the nearest is 0.003"), (0.0001, "")])
def test_a_search_that_would_not_begin_where_the_plan_says_is_refused(decay, end):
    """It began at the nearest rung, or, below the first one, with the default rate."""
    family = {**TINY["family"][0], "start": {**START, "weight_decay": decay}}
    with pytest.raises(PlanError, match=f"got weight_decay = {decay}{end}$"):
        parse(changed(family=[family, *TINY["family"][1:]]), "tiny")


def test_a_plan_must_be_committed_before_it_runs(tmp_path):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    path = write(tmp_path / "tiny", TINY)
    with pytest.raises(PlanError, match="commit the plan before the runs"):
        runner(tmp_path, unregistered=False)
    git("add", "."), git("commit", "-qm", "plan")
    commit = registered(path)
    assert commit
    assert runner(tmp_path, unregistered=False).commit == commit
    before = plans.load(path).digest
    write(tmp_path / "tiny", changed(search={"trials": 5}))
    assert plans.load(path).digest != before
    assert registered(path) is None


# ------------------------------------------------------------------------------------ search


def quadratic(ladder, optimum):
    def score(point):
        values = ladder.values(point)
        found = 0.0
        for name, axis in ladder.axes.items():
            here, best = values[name], optimum[name]
            if axis.first is not None:  # the ladder's own coordinate
                here, best = (math.log(1 + x / axis.first) for x in (here, best))
            else:
                here, best = math.log(here), math.log(best)
            found -= (here - best) ** 2
        return found

    return score


AXES = {"lr": Axis(2), "weight_decay": Axis(3, 0.001), "label_smoothing": Axis(2, 0.05, 1)}


@given(
    shift=st.integers(-6, 6),
    decay=st.sampled_from([0.0, 0.001, 0.003, 0.009]),
    smoothing=st.sampled_from([0.0, 0.05, 0.1]),
)
def test_the_search_leaves_its_grid_until_the_best_has_all_its_neighbours(shift, decay, smoothing):
    """Whatever the announced start: a score with one hill is climbed, none ends at an edge."""
    ladder = Ladder(AXES, START)
    best = {"lr": 0.1 * 2.0**shift, "weight_decay": decay, "label_smoothing": smoothing}
    scores = search(ladder, 40, quadratic(ladder, best))
    assert len(scores) == 40
    top = ranked(scores)[0]
    assert ladder.values(top) == pytest.approx(best)
    assert ladder.interior(top, scores)
    for i, axis in enumerate(AXES.values()):
        for k in (-1, 1):
            beside = (*top[:i], top[i] + k, *top[i + 1 :])
            assert beside in scores or (axis.first is not None and ladder.values(beside) is None)


def test_announced_axes_move_before_anything_is_chosen():
    """Three trials of the rate, then of the penalty from the best of them, then of the decay."""
    axes = {**AXES, "penalty": Axis(3, announced=True), "decay": Axis(3, 1.0, 5.0, True)}
    ladder = Ladder(axes, {**START, "penalty": 0.05, "decay": 0.0})
    scores = search(ladder, 8, lambda point: point[0] + 3 * point[3])
    assert list(scores) == [
        (0, 0, 0, 0, 0), (2, 0, 0, 0, 0), (-2, 0, 0, 0, 0),
        (2, 0, 0, 2, 0), (2, 0, 0, -2, 0),
        (2, 0, 0, 2, 2),  # two below a decay of 0: none
        (3, 0, 0, 2, 0), (4, 0, 0, 2, 0),
    ]  # fmt: skip
    quiet = Ladder({**axes, "penalty": Axis(3), "decay": Axis(3, 1.0)}, ladder.start)
    scores = search(quiet, 12, lambda point: point[0] + 3 * point[3])
    assert {quiet.values(p)["penalty"] for p in scores} == {0.05}


def test_too_few_trials_are_told():
    ladder = Ladder(AXES, START)
    scores = search(ladder, 6, lambda point: point[0])
    assert not ladder.interior(ranked(scores)[0], scores)


def test_ladders_end_where_values_do():
    assert [Axis(2, 0.05, 1).value(0.4, k) for k in (-5, -4, -3, 0, 1, 2)] == [
        None, 0.0, 0.05, 0.4, 0.8, None,
    ]  # fmt: skip
    assert Axis(3, 0.001).value(0.081, -1) == pytest.approx(0.027)
    assert Axis(2).value(0.1, -3) == pytest.approx(0.0125)


# ------------------------------------------------------------------------------------ runner


def test_all_families_get_the_same_trials_and_every_seed_a_row(finished):
    trials = Table(finished / "tiny" / "trials.jsonl").rows()
    rows = Table(finished / "tiny" / "runs.jsonl").rows()
    plan = plans.load(finished / "tiny" / "plan.toml")
    for family in plan.families:
        own = [t for t in trials if t["family"] == family.name]
        assert len(own) == len({tuple(t["point"]) for t in own}) == 4
        best = max(own, key=lambda t: scored(t, 0.5))
        chosen = [r for r in rows if r["family"] == family.name and 0.5 in r["shares"]]
        assert [r["seed"] for r in chosen] == [0, 1]
        # no row mixes settings: each seed is trained with the one that validation chose
        assert all(r["values"] == best["values"] for r in chosen)
        # the second score chooses among the same trials: clean accuracy alone
        second = [r for r in rows if r["family"] == family.name and 0.0 in r["shares"]]
        cleanest = max(own, key=lambda t: scored(t, 0.0))
        assert [r["values"] for r in second] == [cleanest["values"]] * 2
    assert {r["plan"] for r in rows} == {plan.digest}


def test_equal_numbers_of_images_are_a_tie():
    """Sums of floats differ in their last bit; the search must not turn on that."""
    generator = random.Random(0)
    for _ in range(200):
        right = [generator.randint(200, 430) for _ in range(4)]
        moved = [right[0] - 1, right[1] - 1, right[2] + 1, right[3] + 1]
        one, other = (
            {"clean": [k / 434 for k in r[:2]], "worst": [k / 434 for k in r[2:]]}
            for r in (right, moved)
        )
        assert scored(one, 0.5) == scored(other, 0.5)


def test_a_diverged_seed_is_a_row_of_its_own(finished):
    rows = Table(finished / "tiny" / "runs.jsonl").rows()
    wild = [r for r in rows if r["family"] == "wild"]
    assert wild
    assert all(r["diverged"] for r in wild)
    assert all("clean" in r for r in rows if r["family"] != "wild")


def test_rows_hold_what_was_asked_for(finished):
    rows = Table(finished / "tiny" / "runs.jsonl").rows()
    done = [r for r in rows if not r.get("diverged")]
    for row in done:
        worst = row["worst"]["0.06"]
        assert worst["accuracy"] <= min(1.0, row["pgd"]["0.06"] + 0.051)
        assert {"versions", "processor", "commit"} <= set(row["conditions"])
        assert set(row["fgsm"]) == {"0.06"}
        assert set(row["transfer"]) == {"0.1"}
        assert worst["attacks"][0] == "pgd"
    dense = next(r for r in done if r["family"] == "dense")
    ours = next(r for r in done if r["family"] == "ours")
    assert dense["stored_share"] == 1.0
    cut = next(r for r in done if r["family"] == "cut")
    assert ours["stored_share"] < cut["stored_share"] < 0.5  # ranks of its own
    assert ours["worst_l2"]["0.1"]["accuracy"] <= ours["clean"]["accuracy"] + 0.1
    assert ours["multiply_adds"] < dense["multiply_adds"]
    assert ours["condition"]["ratio"]["max"] <= 1.0
    assert max(c for c in ours["cond"]) <= 1.1 * (1 + 1e-5)


def test_networks_are_kept_on_demand(tmp_path):
    one = changed(family=TINY["family"][2:3], seeds=[0], reference="ours", search={"trials": 1})
    del one["hypothesis"]
    assert runner(tmp_path, one, keep=True).go()
    (path,) = (tmp_path / "scratch").glob("*.network.pt")
    (row,) = Table(tmp_path / "tiny" / "runs.jsonl").rows()
    model = torch.load(path, weights_only=False)
    found = measures.layer_conds(model)["fc1"]
    assert found == pytest.approx(row["layers"]["fc1"], rel=1e-3)


def test_a_plan_leaves_the_test_images_of_an_earlier_one_alone(tmp_path):
    one = changed(family=TINY["family"][2:3], seeds=[0], reference="ours", search={"trials": 1})
    one["attack"] = {**one["attack"], "images": 30, "skip": 40}
    del one["hypothesis"]
    assert runner(tmp_path, one, keep=True).go()
    data = load(one["network"]["data"])
    earlier, own, both = (measures.drawn(data, *a) for a in ((40,), (30, 40), (70,)))
    assert all(torch.equal(torch.cat(x[:2]), x[2]) for x in zip(earlier, own, both, strict=True))
    (path,) = (tmp_path / "scratch").glob("*.network.pt")
    (row,) = Table(tmp_path / "tiny" / "runs.jsonl").rows()
    right = torch.load(path, weights_only=False)(own[0]).argmax(-1) == own[1]
    stands = measures.unpacked(next(iter(row["worst"].values()))["robust"], row["images"])
    assert row["images"] == 30
    assert stands.any()
    assert not stands[~right.numpy()].any()


def one_dense(**tables):
    found = changed(family=TINY["family"][:1], seeds=[0], search={"trials": 1}, **tables)
    del found["hypothesis"]
    return found


def test_to_skip_more_test_images_than_there_are_is_refused_before_any_training(tmp_path):
    raw = one_dense(attack={"images": 30, "skip": 340})
    with pytest.raises(PlanError, match=r"skip = 340 and images = 30 .* 355 test images of digits"):
        runner(tmp_path, raw).go()
    assert not (tmp_path / "tiny" / "trials.jsonl").exists()


def test_a_network_that_overflows_with_finite_weights_is_a_diverged_row(tmp_path):
    """One step of 1e15: the loss was that of before, and each weight is a number."""
    start = {**START, "lr": 1e15}
    raw = one_dense(training={"epochs": 1, "batch_size": 512})
    raw["family"] = [{**raw["family"][0], "start": start}]
    assert runner(tmp_path, raw).go()
    (trial,) = Table(tmp_path / "tiny" / "trials.jsonl").rows()
    assert (trial["clean"], trial["worst"]) == ([0.0], [0.0])
    (row,) = Table(tmp_path / "tiny" / "runs.jsonl").rows()
    assert row["diverged"]


def test_a_line_that_is_torn_within_a_letter_is_no_row(tmp_path):
    table = Table(tmp_path / "rows.jsonl")
    table.append({"key": "a", "family": "τ = 0"})
    line = table.path.read_bytes().replace(b'"a"', b'"b"')
    with open(table.path, "ab") as file:
        file.write(line[: line.index("τ".encode()) + 1])
    assert [row["key"] for row in table.rows()] == ["a"]
    table.append({"key": "c", "family": "τ = 0"})
    assert [row["key"] for row in table.rows()] == ["a", "c"]


def test_rows_from_a_folder_that_is_not_there_are_not_taken(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: holds neither"):
        runner(tmp_path).take(tmp_path / "nowhere")


def test_an_attack_computes_an_orthogonal_matrix_once():
    torch.manual_seed(0)
    network = orthogonalize(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)))
    images, calls = (torch.rand(12, 6), torch.randint(3, (12,))), []
    network[0].parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    asked = SimpleNamespace(attacks=("pgd", "square"), restarts=2, steps=5, queries=20)
    attacked = measures.laid_out(network)
    found = measures.worst_case(attacked, images, 0.1, asked, "linf")
    assert len(calls) == 1
    options = {"attacks": asked.attacks, "restarts": 2, "steps": 5, "queries": 20}
    assert found["after"] == robustness.worst_case(network, images, 0.1, **options).after
    assert len(calls) > 20


@pytest.mark.parametrize("kind", ["dense", "condlr", "factors", "orthogonal", "fixed_rank"])
def test_attacks_see_the_same_function_in_a_faster_layout(kind):
    torch.manual_seed(0)
    images = torch.rand(8, 1, 28, 28)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 5), torch.nn.ReLU(), torch.nn.Conv2d(6, 8, 3, padding=1),
        torch.nn.Flatten(), torch.nn.Linear(8 * 24 * 24, 10),
    ).eval()  # fmt: skip
    if kind == "orthogonal":
        orthogonalize(network)
    elif kind == "factors":
        two_factors(network, 0.3)
    elif kind != "dense":
        lrm.factorize(network, rank=0.3, tau=0.1 if kind == "condlr" else None)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    faster = measures.laid_out(network)
    assert not any(isinstance(layer, LowRankLayer) for layer in faster.modules())
    assert not any(is_parametrized(layer) for layer in faster.modules())
    last = torch.channels_last
    kernels = [p for p in faster.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert kernels
    assert all(p.is_contiguous(memory_format=last) for p in kernels)
    torch.testing.assert_close(faster(images), network(images), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)


def test_no_half_of_a_finished_training_is_left(finished):
    """A later run with other code would go on from it and say nothing."""
    assert not list((finished / "scratch").glob("first-*"))


def test_finished_work_is_not_done_again(finished, monkeypatch):
    before = [(finished / "tiny" / f"{n}.jsonl").read_bytes() for n in ("trials", "runs")]
    monkeypatch.setattr("benchmarks.robustness.runner.train", None)
    assert runner(finished).go()
    after = [(finished / "tiny" / f"{n}.jsonl").read_bytes() for n in ("trials", "runs")]
    assert after == before


def test_a_run_that_is_cut_off_goes_on_to_the_same_rows(finished, tmp_path, monkeypatch):
    small = {"save_every": 3}
    assert not runner(tmp_path, minutes=0.0, **small).go()
    calls = 0

    def stop_now_and_then(self):
        nonlocal calls
        calls += 1
        if calls % 61 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "_check_time", stop_now_and_then)
    for _ in range(60):
        try:
            assert runner(tmp_path, **small).go()
            break
        except KeyboardInterrupt:
            continue
    assert calls > 61
    for name in ("trials", "runs"):
        one, other = (
            Table(folder / "tiny" / f"{name}.jsonl").rows() for folder in (finished, tmp_path)
        )
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert a["key"] == b["key"]
            assert a.get("clean") == b.get("clean")
            assert a.get("worst") == b.get("worst")


def test_the_plan_for_cifar_runs_at_tiny_size(tmp_path, monkeypatch):
    """The network, the recipe and the search of the real file, on a few random images."""
    raw = plans.tomllib.loads((FOLDER / "robustness/cifar10/plan.toml").read_text("utf-8"))
    families = [f for f in raw["family"] if f["name"] in ("dense SGD", "CondLR τ=0, 25 %")]
    attack = {**raw["attack"], "images": 4, "steps": 1, "queries": 5, "masking_images": 0}
    search = {**raw["search"], "trials": 1, "epochs": 1, "images": 4, "steps": 1, "queries": 5}
    training = {**raw["training"], "epochs": 1, "batch_size": 20}
    raw |= {
        "family": families, "attack": attack, "search": search, "training": training,
        "seeds": [0],
    }  # fmt: skip
    del raw["hypothesis"]
    y = torch.arange(40) % 10
    x = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names, half = tuple("0123456789"), (0.5, 0.5, 0.5)
    data = Dataset("cifar10", x, y, x[:20], y[:20], 10, names, half, half)
    monkeypatch.setattr("benchmarks._shared.load", lambda name, root: data)
    assert runner(tmp_path, raw).go()
    dense, ours = Table(tmp_path / "tiny" / "runs.jsonl").rows()
    assert dense["stored_share"] == 1.0
    assert ours["stored_share"] == pytest.approx(0.25, abs=0.005)
    assert set(ours["fgsm"]) == {"0.002", "0.004", "0.006"}


def test_a_torn_last_line_costs_one_row_only(tmp_path):
    table = Table(tmp_path / "rows.jsonl")
    table.append({"key": "a", "value": math.nan})
    with open(table.path, "a") as file:
        file.write('{"key": "b", "val')
    table.append({"key": "c", "value": 1.0})
    assert table.rows() == [{"key": "a", "value": None}, {"key": "c", "value": 1.0}]
    assert len(table.path.read_text().splitlines()) == 3


def test_the_source_of_transfer_is_another_network(tmp_path):
    """Another start, another order: not the network that it is tried on."""
    work = runner(tmp_path)
    plan = work.plan
    source = work._source(0)
    same = work._train(plan.family("dense"), work.chosen(plan.family("dense"))[0][0], 0, "same")
    weights = [m.network.fc1.weight.flatten() for m in (source, same.model)]
    assert torch.cosine_similarity(*weights, dim=0) < 0.5


def test_a_plan_can_ask_for_adversarial_training(tmp_path):
    """Of trials and of the test, with the radius of the plan; nothing else changes."""
    attacked = changed(
        family=TINY["family"][:1], seeds=[0], training={"epochs": 6}, search={"trials": 1},
        attack={"condition_images": 0, "transfer": []},
    )  # fmt: skip
    del attacked["hypothesis"]
    rows = []
    for name, how in (("plain", None), ("attacked", {"eps": 0.2, "steps": 2, "ramp": 0.0})):
        raw = attacked if how is None else {**attacked, "adversarial": how}
        work = runner(tmp_path / name, raw)
        assert work.go()
        rows += [(work.trials.rows()[0], work.rows.rows()[0])]
    (plain_trial, plain), (hard_trial, hard) = rows
    assert hard["loss"][-1] > plain["loss"][-1] + 0.1
    assert hard_trial["clean"] != plain_trial["clean"]
    with pytest.raises(PlanError, match="single"):
        plans.load(write(tmp_path / "wrong", {**attacked, "adversarial": {"eps": 1, "kind": "x"}}))


def test_parse_gives_the_family_everything_but_its_search():
    plan = parse(TINY, "tiny")
    method, settings = plan.made(plan.family("cut"), {**START, "finetune": 0.1}, 7, 3)
    assert (method.kind, method.finetune) == ("finetuned", 0.1)
    assert (settings.seed, settings.epochs, settings.batch_size) == (7, 3, 32)


def test_rows_may_be_measured_elsewhere_and_put_together(finished, tmp_path):
    parts = [tmp_path / "half", finished]
    runner(parts[0])
    for kind in ("trials", "runs"):
        lines = (finished / "tiny" / f"{kind}.jsonl").read_text().splitlines(keepends=True)
        (parts[0] / "tiny" / f"{kind}.jsonl").write_text("".join(lines[::2]))
    whole = runner(tmp_path / "whole")
    whole.commit = "abc"
    assert sum(whole.take(part / "tiny") for part in parts) > 0
    assert not any(whole.take(part / "tiny") for part in parts)
    for kind in ("trials", "runs"):
        kept = {row["key"] for row in Table(tmp_path / "whole" / "tiny" / f"{kind}.jsonl").rows()}
        assert kept == {row["key"] for row in Table(finished / "tiny" / f"{kind}.jsonl").rows()}
    assert {row["plan_commit"] for row in whole.rows.rows()} == {"abc"}
    other = runner(tmp_path / "other", changed(title="another plan"))
    assert other.take(parts[0] / "tiny") == 0
