"""The plan and the tables of the certified benchmark."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from benchmarks._shared import alone
from benchmarks.certified import gpu, plan, table
from benchmarks.certified.__main__ import Place, chosen, every_block, main, read, result_of
from benchmarks.certified.networks import Tokens, build, sizes, truncate
from benchmarks.certified.peers import (
    DenseResidual,
    LinearResidual,
    OrthogonalRows,
    liresnet,
    unit_rows,
)
from benchmarks.certified.training import fitting, moved, train
from lrmanifold import certify
from lrmanifold.experiments.data import load


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


@pytest.mark.parametrize("network", ["potential", "folds", "tree", "small", "larger"])
def test_the_other_networks_are_within_their_size(network):
    digits = load("digits")
    run = getattr(gpu if network in ("small", "larger") else plan, network)(0)
    shape = (1, 3, 32, 32) if run.network == "tree" else (1, 1, 28, 28)
    model = build(run, dataclasses.replace(digits, train_x=torch.zeros(shape)))
    assert sizes(model)["stored"] <= (1_000_000 if network == "larger" else 500_000)
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
    for _ in range(80):
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
    path.rename(tmp_path / "aside")
    with alone(path):  # another process is at it
        assert result_of(run, Place(tmp_path), wait=False) is None
        (tmp_path / "aside").rename(path)
        assert result_of(run, Place(tmp_path), wait=False) == json.loads(path.read_text())
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
    group, twin = next(iter(gpu.TWINS.items()))
    cpu = {(group, "low rank"): 2, (group, "dense"): 2}
    assert gpu.preferred(group, cpu, methods) == group
    some = {**cpu, (twin, "low rank"): 5, (twin, "dense"): 1}
    assert gpu.preferred(group, some, methods) == group
    assert gpu.preferred(group, {**some, (twin, "dense"): 2}, methods) == twin
    assert gpu.preferred("mnist0.3-long", {}, methods) == "mnist0.3-long"
    assert set(gpu.TWINS) <= set(table.TITLES)
    assert set(gpu.TWINS.values()) <= set(table.TITLES)


def test_a_table_has_rows_of_one_machine():
    here = {"device": "cuda", "conditions": {"gpu": "G", "cores": 16}}
    assert "G, 16 cores" in table.machine([here, here])
    with pytest.raises(ValueError, match="several machines"):
        table.machine([here, {"device": "cpu"}])


def test_a_block_that_does_not_exist_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["certified", "run", "mnist0.3-width"])
    with pytest.raises(SystemExit):
        main()
    assert "got mnist0.3-width" in capsys.readouterr().err
