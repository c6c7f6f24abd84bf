"""Every speed benchmark runs at tiny size and writes what it says; the clockwork is right."""

from __future__ import annotations

import json
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

# `benchmarks` stands beside the package and is not installed.
ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from benchmarks.speed.__main__ import NAMES  # noqa: E402
from benchmarks.speed._plot import draw  # noqa: E402
from benchmarks.speed._run import Settings, publish  # noqa: E402
from benchmarks.speed._timing import (  # noqa: E402
    Quartiles,
    Task,
    gemm_rate,
    interleave,
    share_of_limit,
    step_flops,
)

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [*NAMES, pytest.param("replicas", marks=pytest.mark.slow)])
def test_benchmark_runs_at_tiny_size_and_writes_its_results(name, tmp_path):
    settings = Settings(quick=True, output=tmp_path)
    report = import_module(f"benchmarks.speed.{name}").measure(settings)
    publish(name, report, settings)
    written = json.loads((tmp_path / f"speed_{name}.json").read_text())
    assert written["conditions"]["versions"]["torch"]
    assert len(written["results"]["rows"]) == len(report.rows) > 0
    assert set(report.columns) <= {key for row in report.rows for key in row} | {"note", "peak"}
    assert (tmp_path / f"speed_{name}.png").exists() == bool(report.panels)


def test_tasks_of_a_round_run_in_turn_and_preparation_is_not_timed():
    order: list[str] = []
    tasks = {
        "a": Task({"first": lambda: order.append("1"), "second": lambda: order.append("2")}),
        "b": Task({"all": lambda: order.append("b")}, lambda: order.append("p")),
    }
    samples = interleave(tasks, device=CPU, rounds=2, warmup=1)
    assert "".join(order) == "12pb" * 3
    assert len(samples.values("a", "first")) == len(samples.values("b")) == 2
    assert samples.values("a")[0] == pytest.approx(
        samples.values("a", "first")[0] + samples.values("a", "second")[0]
    )


def test_a_task_that_used_up_its_part_sits_out_and_ratios_use_common_rounds():
    counts = {"slow": 0, "fast": 0}

    def slow() -> None:
        counts["slow"] += 1
        sum(range(200_000))

    def fast() -> None:
        counts["fast"] += 1

    samples = interleave({"slow": slow, "fast": fast}, device=CPU, rounds=20, budget=1e-3)
    assert counts["slow"] < counts["fast"]
    assert math.isnan(samples.values("slow")[-1])
    assert samples.ratio("slow", "fast").median > 1


def test_quartiles_and_limits_by_hand():
    assert Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0, math.nan]) == Quartiles(3.0, 2.0, 4.0)
    assert step_flops([(10, 20, 3)]) == 8 * 30 * 9
    assert step_flops([(10, 20, 3), (1, 1, 1)], exact_metric=False) == 6 * (30 * 9 + 2)
    assert share_of_limit(5.0, 10.0, 2.0) == 0.25
    assert gemm_rate(CPU, size=64, trials=2) > 0


def test_fitted_exponent_and_break_even_of_power_laws():
    exponent = import_module("benchmarks.speed.scaling").exponent
    break_even = import_module("benchmarks.speed.layer").break_even
    points = [(float(x), 3.0 * x**2.5) for x in (1, 2, 4, 8)]
    assert exponent(points) == pytest.approx(2.5)
    assert break_even([(x, 2.0 * x) for x in (0.1, 0.3, 0.9)]) == pytest.approx(0.5)
    assert break_even([(0.1, 0.2), (0.9, 0.8)]) == 1.0
    assert math.isnan(break_even([(0.1, 1.2)]))


def test_a_figure_of_no_finite_points_is_drawn():
    Panel = import_module("benchmarks.speed._plot").Panel
    assert draw([Panel("t", "x", "y", {"a": [(1.0, math.nan)]})]).axes


def test_peers_compute_the_same_function_as_our_layers():
    peers = import_module("benchmarks.speed._peers")
    models = import_module("benchmarks.speed._models")
    start = peers.Start.of(models.two_convolutions(), 0.3)
    x = torch.randn(2, 3, 8, 8)
    built, missing = peers.build_all(start)
    assert set(missing) <= {"geotorch"}
    with torch.no_grad():
        for name, (model, _) in built.items():
            reference = start.dense if "dense" in name else start.low_rank
            torch.testing.assert_close(model(x), reference(x), atol=1e-4, rtol=1e-4, msg=name)
