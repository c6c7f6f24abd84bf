"""The plan and the tables of the certified benchmark."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from benchmarks.certified import gpu, plan, table
from benchmarks.certified.__main__ import Place, chosen, every_block, probe_line, read, result_of
from benchmarks.certified.networks import Tokens, build, sizes, truncate
from benchmarks.certified.peers import (
    DenseResidual,
    LinearResidual,
    OrthogonalRows,
    liresnet,
    unit_rows,
)
from benchmarks.certified.sharing import FAILED, claim, shared, unclaim
from benchmarks.certified.training import decoded, fitting, moved, train
from benchmarks.certified.tries import TRIES
from lrmanifold import certify
from lrmanifold.experiments.data import load
from lrmanifold.experiments.replay import CaptureError


def all_runs():
    for _, items in every_block(2):
        for item in items:
            if isinstance(item, plan.Run):
                yield item
            else:
                yield from item[0]
                yield dataclasses.replace(item[1], lr=0.01)


def test_every_run_has_a_file_of_its_own():
    runs = list(all_runs())
    assert len({run.name for run in runs}) == len({json.dumps(run.to_dict()) for run in runs})


def test_every_method_gets_as_many_tries_on_validation_images():
    tries: dict[str, int] = {}
    for name, items in plan.blocks():
        if name == "mnist0.3":
            for runs, base in items:
                assert all(run.choice for run in runs)
                assert not base.choice
                tries[base.method] = len(runs)
    assert set(tries) == set(plan.METHODS)
    assert len(set(tries.values())) == 1


@pytest.mark.parametrize("method", plan.METHODS)
def test_networks_have_equal_deployed_sizes_and_are_certified(method):
    digits = load("digits")
    images = dataclasses.replace(
        digits, train_x=torch.zeros(1, 1, 28, 28), test_x=torch.rand(3, 1, 28, 28)
    )
    widths, rank = plan.SHAPES[method]
    run = dataclasses.replace(plan.long_run(0), method=method, widths=widths, rank=rank)
    model = build(run, images)
    if method == "truncated":
        model = truncate(model, 64)
    assert 0.85 * 151_000 <= sizes(model)["deployed"] <= 152_000
    x = images.test_x
    assert bool((certify.radius(model.eval(), x) >= 0).all())


@pytest.mark.parametrize("network", ["potential", "folds", "tree"])
def test_the_other_networks_are_within_half_a_million(network):
    digits = load("digits")
    run = {"potential": plan.potential, "folds": plan.folds, "tree": plan.tree}[network](0)
    shape = (1, 3, 32, 32) if network == "tree" else (1, 1, 28, 28)
    model = build(run, dataclasses.replace(digits, train_x=torch.zeros(shape)))
    assert sizes(model)["stored"] <= 500_000
    report = certify.lipschitz(model, shape[1:])
    assert {row.kind for row in report.rows} <= {
        "Flatten", "Unflatten", "Tokens", "MaxMin", "LowRankLinear", "ConvexPotential",
        "Linear",
    }  # fmt: skip
    if network == "folds":  # nothing before the last layer stretches, whatever is learned
        assert report.body == pytest.approx(1.0, abs=1e-4)
    # no bound of the tree needs an iteration over frequencies
    assert all("frequencies" not in row.how for row in report.rows)


def test_the_peer_is_certified_by_sound_bounds():
    torch.manual_seed(0)
    model = liresnet(3, 32, 10)
    with torch.no_grad():  # norms away from 1, biases away from 0
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    x = torch.rand(4, 3, 32, 32)
    report = certify.lipschitz(model.eval(), x.shape[1:])
    bounds = {row.name: row.bound for row in report.rows}
    activity, checked = x.double(), 0
    wide = copy.deepcopy(model).double()
    for i, module in enumerate(wide):
        if isinstance(module, (LinearResidual, DenseResidual, OrthogonalRows)):
            norm = map_norm(module, activity[:1])
            assert norm <= bounds[str(i)] <= 1.1 * norm
            checked += 1
        activity = module(activity)
    assert checked == 11
    # what training sees is the same from below, once its iterations are warm
    bound = certify.LipschitzBound(model, x.shape[1:])
    body = [bound.evaluate()[1] for _ in range(10)][-1]
    assert 0.9 * report.body <= float(body) <= report.body
    rows = torch.linalg.vector_norm(model[-1].weight, dim=1)
    unit_rows(model[-1])
    assert not torch.allclose(rows, torch.ones(10))
    assert torch.allclose(torch.linalg.vector_norm(model[-1].weight, dim=1), torch.ones(10))


def map_norm(module, x):
    """Largest singular value of an affine map at images like `x`, by power iteration."""
    zero = module(torch.zeros_like(x))
    v = torch.randn_like(x)
    for _ in range(300):
        v = (v / v.norm()).requires_grad_()
        y = module(v) - zero
        (u,) = torch.autograd.grad(y, v, y.detach())
        norm, v = float(y.detach().norm()), u.detach()
    return norm


@pytest.mark.parametrize("crop", [0, 2])
def test_augmentation_moves_whole_pixels(crop):
    run = dataclasses.replace(plan.longer_tree(0), crop=crop, flip=False)
    x = torch.rand(64, 3, 32, 32)
    y = moved(x, run, torch.Generator().manual_seed(0))
    assert y.shape == x.shape
    bordered = torch.nn.functional.pad(x, (crop,) * 4, mode="reflect")
    places = [
        [(i, j) for i in range(2 * crop + 1) for j in range(2 * crop + 1)
         if torch.equal(bordered[k, :, i : i + 32, j : j + 32], y[k])]
        for k in range(64)
    ]  # fmt: skip
    assert all(len(found) == 1 for found in places)
    assert len({found[0] for found in places}) > crop * 8


def test_tokens_are_the_patches_of_a_quadtree():
    x = torch.randn(2, 3, 32, 32)
    tokens = Tokens()(x)
    assert tokens.shape == (2, 64, 48)
    # tokens 4 k to 4 k + 3 are the patches of one 8 x 8 square, and so on upwards
    for level, side in ((4, 8), (16, 16)):
        squares = x.unfold(2, side, side).unfold(3, side, side)
        first = tokens[:, :level].flatten(1).sort(1).values
        assert torch.equal(first, squares[:, :, 0, 0].flatten(1).sort(1).values)
        last = tokens[:, -level:].flatten(1).sort(1).values
        assert torch.equal(last, squares[:, :, -1, -1].flatten(1).sort(1).values)
    assert torch.equal(tokens[:, 0], x[:, :, :4, :4].flatten(1))


def test_a_run_is_measured_once_and_read_again(tmp_path):
    run = dataclasses.replace(
        plan.long_run(0), data="digits", widths=(16, 16), rank=8, epochs=1, shift=0.0, rotate=0.0,
        zoom=0.0, eps=0.1, eps_train=0.1,
    )  # fmt: skip
    first = result_of(run, Place(tmp_path))
    assert first["verified"] <= first["attacked"] <= first["clean"]
    path = tmp_path / f"{run.name}.json"
    before = path.stat().st_mtime_ns
    assert result_of(run, Place(tmp_path)) == json.loads(path.read_text())
    assert path.stat().st_mtime_ns == before
    results = read(tmp_path)
    pytest.importorskip("matplotlib")
    table.write(results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "16-16 rank 8" in text
    # a row whose proof an attack breaks is no row
    results[0]["attacked"] = results[0]["verified"] - 0.1
    with pytest.raises(ValueError, match="verified <= attacked <= clean"):
        table.markdown(results)


def test_a_rate_at_the_end_of_those_tried_is_followed_further():
    tries = [dataclasses.replace(plan.long_run(0), lr=lr) for lr in (1e-3, 3e-3)]
    asked = []

    def peak_at(best):
        def verified(run):
            asked.append(run.lr)
            return -abs(run.lr - best)

        return verified

    assert chosen(tries, peak_at(3e-3)).lr == 3e-3
    assert asked == [1e-3, 3e-3, 9e-3]
    assert chosen(tries, peak_at(3.3e-4)).lr == 3.3e-4
    asked.clear()
    assert chosen(tries, peak_at(1.0)).lr == 8.1e-2
    assert len(asked) == 5  # three more than were given
    assert chosen(tries[:1], peak_at(1.0)).lr == 1e-3


def test_tries_have_files_of_their_own_and_are_within_their_size():
    assert len({run.name for _, run in TRIES}) == len(TRIES)
    assert len({title for title, _ in TRIES}) == len(TRIES)
    assert all(run.choice for _, run in TRIES)
    images = dataclasses.replace(load("digits"), train_x=torch.zeros(1, 3, 32, 32))
    ours = [(title, run) for title, run in TRIES if run.method != plan.PEER]
    shapes = {(r.widths, r.rank, r.depth, r.folds, r.levels): (title, r) for title, r in ours}
    for title, run in shapes.values():
        most = 1_000_000 if "larger" in title else 500_000
        assert 0.9 * most <= sizes(build(run, images))["stored"] <= most


def test_a_run_is_cut_to_the_time_that_is_left():
    assert fitting(150, 2, 1.0, 1000.0) == 150
    assert fitting(150, 2, 1.0, 120.0) == 100  # in coarse steps, with a margin
    assert fitting(150, 2, 1.0, 1.0) == 3
    assert fitting(100, 50, 2.0, 60.0) == 80  # it got slower
    assert fitting(100, 100, 2.0, -5.0) == 100
    run = plan.Run(group="g", data="digits", method="low rank", network="mlp", widths=(8,), rank=4,
                   eps=0.1, eps_train=0.1, epochs=9, lr=1e-2)  # fmt: skip
    _, losses, replayed = train(run, load("digits"), until=0.0)  # long ago
    assert len(losses) == 2
    assert not replayed
    assert len(train(run, load("digits"))[1]) == 9


def test_a_group_of_the_gpu_is_quoted_once_it_has_as_many_runs():
    methods = ("low rank", "dense")
    cpu = {("mnist0.3", "low rank"): 2, ("mnist0.3", "dense"): 2}
    assert gpu.preferred("mnist0.3", cpu, methods) == "mnist0.3"
    some = {**cpu, ("mnist0.3-gpu", "low rank"): 5, ("mnist0.3-gpu", "dense"): 1}
    assert gpu.preferred("mnist0.3", some, methods) == "mnist0.3"
    assert gpu.preferred("mnist0.3", {**some, ("mnist0.3-gpu", "dense"): 2}, methods) != "mnist0.3"
    assert gpu.preferred("mnist0.3-long", {}, methods) == "mnist0.3-long"
    assert set(gpu.TWINS) <= set(table.TITLES)
    assert set(gpu.TWINS.values()) <= set(table.TITLES)


def test_a_table_has_rows_of_one_machine():
    here = {"device": "cuda", "conditions": {"gpu": "G", "cores": 16}}
    assert "G, 16 cores" in table.machine([here, here])
    with pytest.raises(ValueError, match="several machines"):
        table.machine([here, {"device": "cpu"}])


def test_a_broken_capture_ends_the_process(tmp_path):
    def broken():
        raise CaptureError("no graph")

    path = tmp_path / "one.json"
    with pytest.raises(SystemExit):
        shared(path, broken)
    assert shared(path, broken) == {}  # not again


def test_a_try_is_a_line_that_says_what_differs(tmp_path):
    title, run = next(pair for pair in TRIES if pair[0] == "slow head")
    small = {"data": "digits", "network": "mlp", "widths": (16, 16), "rank": 8, "epochs": 2,
             "crop": 0, "tail": 0.5, "flip": False}  # fmt: skip
    run = dataclasses.replace(run, **small)
    line = probe_line(title, run, result_of(run, Place(tmp_path)))
    assert line["head_rate"] == 0.33
    assert line["lr"] == 9e-3
    assert 0 <= line["ver"] <= line["clean"] <= 100
    assert "shift" not in line


def test_who_is_second_waits_for_a_claimed_result_or_goes_on(tmp_path):
    path = tmp_path / "run.json"
    assert claim(path.with_suffix(".claim"))
    assert not claim(path.with_suffix(".claim"))
    assert shared(path, dict, wait=False) is None
    path.write_text("{}")  # the first is done
    assert shared(path, lambda: pytest.fail("measured twice")) == {}
    path.unlink()
    assert unclaim(tmp_path) == 1
    assert shared(path, lambda: {"x": 1}) == {"x": 1} == json.loads(path.read_text())
    assert not list(tmp_path.glob("*.claim"))


def test_a_failed_measurement_is_not_repeated_before_its_claim_is_removed(tmp_path):
    path = tmp_path / "run.json"

    def fails():
        raise ValueError("no")

    assert shared(path, fails) == {}
    assert path.with_suffix(".claim").read_text() == FAILED
    assert shared(path, lambda: pytest.fail("again")) == {}
    unclaim(tmp_path)
    assert shared(path, lambda: {"x": 1}) == {"x": 1}


def test_decoded_images_are_kept_as_bytes_only_where_they_are(tmp_path, data_dir):
    first = decoded("digits", None, tmp_path)  # sixteenths
    assert not list(tmp_path.iterdir())
    assert first.train_x.dtype == torch.float32
    if not (data_dir / "mnist").is_dir():
        pytest.skip("no MNIST here")
    first, again = (decoded("mnist", str(data_dir), tmp_path) for _ in range(2))
    assert [path.name for path in tmp_path.iterdir()] == ["mnist.pt"]
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(again, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
