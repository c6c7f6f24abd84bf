"""The monitor: right numbers, at the right steps, for next to nothing."""

from __future__ import annotations

import csv
import math
import time

import pytest
import torch
from torch import nn

import lrmanifold as lrm


def network(rank=3, dtype=torch.float32, width=12) -> nn.Module:
    dense = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, width), nn.Linear(width, 2)
    )
    return lrm.factorize(dense, rank=rank, exclude="3", keep_larger=True).to(dtype)


def step(model, optimizer, x=None):
    x = torch.randn(8, 4, 4, 4, dtype=model[0].weight.dtype) if x is None else x
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_the_report(device, dtype):
    model = network(dtype=dtype).to(device)
    found = lrm.monitor(model, every=1).step()
    report = lrm.report(model)
    for layer in report.layers[:2]:
        for key in ("cond", "drift", "sigma_max", "sigma_min", "rank"):
            assert found[f"{key}/{layer.name}"] == pytest.approx(getattr(layer, key), rel=1e-5)
    assert found["cond"] == max(found["cond/0"], found["cond/2"])
    assert found["drift"] == max(found["drift/0"], found["drift/2"])
    assert set(map(type, found.values())) <= {int, float}


def test_it_measures_every_so_many_steps_and_counts_what_was_skipped():
    model = network()
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    monitor = lrm.monitor(model, optimizer, every=3)
    rows = []
    for i in range(10):
        step(model, optimizer, torch.full((8, 4, 4, 4), torch.nan) if i == 4 else None)
        rows.append(monitor.step())
    assert [row.get("step") for row in rows] == [None, None, 3, None, None, 6, None, None, 9, None]
    assert [row["skipped_steps"] for row in rows if row] == [0, 1, 1]
    assert "skipped_steps" not in lrm.monitor(model, every=1).step()


def test_a_csv_file_takes_it_and_ranks_are_followed(tmp_path):
    model = network()
    monitor = lrm.monitor(model, every=1)
    with open(tmp_path / "run.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, monitor.measure().keys())
        writer.writeheader()
        writer.writerow(monitor.step())
        model.load_state_dict(network(rank=2).state_dict())
        writer.writerow(monitor.step())
    rows = list(csv.DictReader((tmp_path / "run.csv").read_text().splitlines()))
    assert [row["rank/2"] for row in rows] == ["3", "2"]


def test_what_is_not_finite_shows_and_nothing_is_changed():
    model = network()
    monitor = lrm.monitor(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    monitor.measure()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        model[0].weight.mul_(torch.nan)
    found = monitor.measure()
    assert found["cond/0"] != found["cond/0"]
    assert found["cond/2"] == pytest.approx(float(model[2].manifold.cond(model[2].weight.detach())))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("how", ["nan", "dead"])
def test_the_worst_of_all_layers_is_nan_wherever_the_broken_one_is(device, place, how):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    model = lrm.factorize(model, 2, tau=None, include="*").to(device)
    assert lrm.monitor(model).measure()["cond"] > 1.0
    with torch.no_grad():
        layer = model[place]
        (layer.weight if how == "nan" else layer.S).mul_(torch.nan if how == "nan" else 0.0)
    found = lrm.monitor(model).measure()
    assert math.isnan(found["cond"])
    assert math.isnan(lrm.report(model).max_cond)
    assert math.isnan(found["drift"]) == (how == "nan")


def test_it_may_be_used_under_autocast():
    model = network()
    expected = lrm.monitor(model).measure()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lrm.monitor(model).measure() == expected


def test_wrong_arguments_are_refused():
    model = network()
    for every in (0, 1.5, True):
        kind = ValueError if every == 0 else TypeError
        with pytest.raises(kind, match="every must be an integer >= 1, got"):
            lrm.monitor(model, every=every)
    with pytest.raises(ValueError, match="model must have low-rank layers, got none"):
        lrm.monitor(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="optimizer must be one of lrmanifold"):
        lrm.monitor(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_it_costs_less_than_2_percent_of_a_step_at_every_50():
    # The cheapest steps there are: small layers, a batch of one. 50 steps against one measurement.
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
    lrm.factorize(model, rank=8)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=1e-3, momentum=0.5)
    monitor = lrm.monitor(model, optimizer)
    x = torch.randn(16, 64)

    def seconds(function) -> float:
        best = []
        for _ in range(15):
            began = time.perf_counter()
            function()
            best.append(time.perf_counter() - began)
        return min(best)

    one_step = seconds(lambda: step(model, optimizer, x))
    share = seconds(monitor.measure) / (50 * one_step)
    assert share < 0.02, f"{share:.2%} of a step"
