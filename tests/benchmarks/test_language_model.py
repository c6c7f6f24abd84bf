"""The benchmark of pre-training: its search, its rivals and its table, without a training run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
# `benchmarks` stands beside the package and is not installed.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import character_model  # noqa: E402
from benchmarks.language_model import runner, table, work  # noqa: E402
from benchmarks.language_model.methods import METHODS, Pair, Spectron  # noqa: E402


def fake(best: dict[tuple[str, float], float], calls: list):
    """A run whose loss is smallest at a known rate."""

    def train(method, ratio, lr, seed, steps, width=128):
        calls.append((method, ratio, lr, seed, steps))
        far = abs(torch.tensor(lr / best.get((method, ratio), 0.01)).log2().item())
        return {
            **dict(zip(("method", "ratio", "lr", "seed", "steps"), calls[-1], strict=True)),
            "validation": 2.0 + 0.1 * far + 0.01 * seed,
            "test": 1.9 + 0.1 * far,
            "spikes": 0,
            "weights": 1.0,
            "step_ms": 20.0 if method == "dense AdamW" else 40.0,
        }

    return train


def test_the_search_goes_on_until_the_best_rate_is_inside_and_nothing_runs_twice(
    monkeypatch, tmp_path
):
    calls: list = []
    name = "dense AdamW"
    monkeypatch.setattr(runner, "train", fake({(name, 1.0): 16e-3}, calls))
    runs = runner.Runs(tmp_path / "lines.jsonl")
    assert runs.best(name, 1.0) == pytest.approx(16e-3)
    rates = {call[2] for call in calls}
    assert min(rates) < 16e-3 < max(rates)
    count = len(calls)
    again = runner.Runs(tmp_path / "lines.jsonl")
    assert again.best(name, 1.0) == pytest.approx(16e-3)
    assert len(calls) == count == len((tmp_path / "lines.jsonl").read_text().splitlines())
    assert runner.widening(again.losses(name, 1.0)) == []
    flat = {2.0**k: 1.0 + 1e-3 * abs(k) for k in range(-4, 5)}
    assert runner.widening(flat) == [] != runner.widening({1.0: 1.0})
    inside, closed = table.window(again.losses(name, 1.0))
    assert inside == [pytest.approx(16e-3)]
    assert closed


def test_the_work_ends_when_every_window_is_closed_and_every_seed_was_run(monkeypatch, tmp_path):
    calls: list = []
    monkeypatch.setattr(runner, "train", fake({}, calls))
    runs = runner.Runs(tmp_path / "lines.jsonl", width=256)
    for _ in range(1000):
        key = work.next_job(runs)
        if key is None:
            break
        runs.get(*key)
    assert len(calls) == len(set(calls)) < 1000
    for method in METHODS:
        for ratio in runs.ratios(method):
            assert set(table.at_best(runs, method, ratio)) == set(runner.SEEDS)
            assert table.window(runs.losses(method, ratio))[1]
    assert "Not run" not in "".join(table.table(runs))
    # The first stage takes every method once, before any method a second time.
    cases = [call[:2] for call in calls[:10]]
    assert len(set(cases)) == len(cases)


def test_work_that_is_on_its_way_is_not_handed_out_again_nor_what_does_not_fit(tmp_path):
    runs = runner.Runs(tmp_path / "lines.jsonl")
    busy: list = []
    while key := work.next_job(runs, busy):
        busy.append(key)
    # Three rates of each method; more would have to know their losses.
    assert len(busy) == len(set(busy)) == 3 * sum(len(runs.ratios(m)) for m in METHODS)
    runs.times = [{"method": "dense Muon", "ratio": 1.0, "step_ms": 20.0}]
    assert work.next_job(runs, busy[1:], 1.0) == busy[0]
    muon = next(key for key in busy if key[0] == "dense Muon")
    others = [key for key in busy if key != muon]
    assert work.next_job(runs, others, 11.0) == muon
    assert work.next_job(runs, others, 9.0) is None


def test_the_table_names_what_was_not_run_and_compares_at_equal_time(monkeypatch, tmp_path):
    calls: list = []
    monkeypatch.setattr(runner, "train", fake({}, calls))
    runs = runner.Runs(tmp_path / "lines.jsonl")
    for method, ratio in (("dense AdamW", 1.0), ("CondLRMuon τ = 0.1", 0.5)):
        for seed in (0, 1):
            runs.get(method, ratio, runs.best(method, ratio), seed, runner.STEPS)
    steps = runner.equal_time_steps(runs, "CondLRMuon τ = 0.1", 0.5)
    assert steps == runner.STEPS // 2
    runs.get("CondLRMuon τ = 0.1", 0.5, runs.best("CondLRMuon τ = 0.1", 0.5), 0, steps)
    lines = list(table.table(runs))
    assert lines[-1].startswith("Not run: dense Muon at 1, A Bᵀ, AdamW at 1/2")
    assert len(lines) == 6
    row = next(line for line in lines if line.startswith("| CondLRMuon τ = 0.1 | 1/2"))
    assert f"({steps})" in row
    assert "-1.7%" in row


def test_a_file_of_another_length_shows_the_ranks_that_it_has(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "train", fake({}, []))
    runs = runner.Runs(tmp_path / "lines.jsonl", steps=2000)
    runs.get("dense AdamW", 1.0, 0.01, 0, 2000)
    assert runs.ratios("A Bᵀ, AdamW") == (0.5, 0.25)
    runs.get("A Bᵀ, AdamW", 0.375, 0.01, 0, 2000)
    assert runs.ratios("A Bᵀ, AdamW") == (0.5, 0.25, 0.375)
    assert any(line.startswith("| A Bᵀ, AdamW | 3/8") for line in table.table(runs))
    table.write(runs)
    assert (tmp_path / "lines.png").exists()


def test_spikes_are_losses_far_above_those_before():
    torch.manual_seed(0)
    losses = (2 + 0.01 * torch.randn(200)).tolist()
    assert runner.spikes(losses) == 0
    losses[120], losses[150] = 3.0, float("nan")
    assert runner.spikes(losses) == 2


def test_spectron_moves_the_product_by_at_most_about_its_rate():
    torch.manual_seed(0)
    dense = nn.Linear(12, 20)
    pair = Pair(dense, 12)
    x = torch.randn(7, 12)
    torch.testing.assert_close(pair(x), dense(x))
    optimizer = Spectron([pair], lr=0.1)
    for step in range(5):
        before = pair.A @ pair.B.mT
        optimizer.zero_grad()
        (pair(x) - 10 * x.sum()).square().mean().backward()
        optimizer.step()
        moved = float(torch.linalg.matrix_norm(pair.A @ pair.B.mT - before, 2))
        # Five steps of Newton-Schulz leave singular values of up to about 1.2.
        assert 0.0 < moved <= (1.3 if step else 1.6) * 0.1


@pytest.mark.parametrize("name", METHODS)
def test_methods_start_alike_and_take_steps(name):
    ratio = 1.0 if METHODS[name].weights == "dense" else 0.5
    model, optimizers = METHODS[name].build(95, ratio, METHODS[name].guess, 0)
    plain, _ = METHODS["dense AdamW"].build(95, 1.0, 1e-3, 0)
    assert torch.equal(model.token.weight, plain.token.weight)
    assert torch.equal(model.head.weight, plain.head.weight)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randint(95, (2, 9))
    model(x).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    moved = [not torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True)]
    assert all(moved)


def test_the_three_parts_of_the_text_are_disjoint():
    text = "".join(chr(200 + i // 1024) for i in range(1024 * 24))
    training, validation, test, size = character_model.load_three(text)
    parts = [set(part.unique().tolist()) for part in (training, validation, test)]
    assert size == 24
    assert [len(part) for part in parts] == [18, 3, 3]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_lines_of_results_are_whole():
    if runner.LINES.exists():
        rows = [json.loads(line) for line in runner.LINES.read_text().splitlines()]
        keys = [tuple(r[k] for k in ("method", "ratio", "lr", "seed", "steps")) for r in rows]
        assert len(set(keys)) == len(keys)
        assert all(r["method"] in METHODS for r in rows)
