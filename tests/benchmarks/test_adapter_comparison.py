"""The benchmark of adapters: rivals that do what their papers say, its search and its table."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
# `benchmarks` stands beside the package and is not installed.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.adapters import runner, table  # noqa: E402
from benchmarks.adapters.methods import (  # noqa: E402
    FULL,
    METHODS,
    Landing,
    LoRA,
    StelLA,
    ThreeFactors,
)
from benchmarks.character_model import Transformer  # noqa: E402


@pytest.mark.parametrize("name", METHODS)
def test_adapters_start_where_the_paper_says_and_only_they_move(name):
    torch.manual_seed(0)
    base = Transformer(20, 16)
    model = copy.deepcopy(base)
    x = torch.randint(20, (2, 9))
    moved = METHODS[name].put(model, 3)
    same = torch.allclose(model(x), base(x), atol=1e-6)
    assert same == (name != "StelLA")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert (not frozen) == (name == FULL)
    optimizer = METHODS[name].rule(moved, 1e-2)
    before = model(x).detach()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model(x), before)
    state = dict(model.named_parameters())
    assert all(torch.equal(state[n], p) for n, p in frozen.items())


def test_numbers_of_trained_weights_are_equal_but_for_the_cores():
    counts = {}
    for name, method in METHODS.items():
        if name == FULL:
            continue
        model = Transformer(20, 16)
        method.put(model, 3)
        counts[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = counts.pop("LoRA, AdamW")
    assert counts.pop("LoRA, Muon") == lora
    assert set(counts.values()) == {lora + 8 * 3**2}


def descend(layer: ThreeFactors, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    target, losses = torch.randn(12, 9) / 3, []
    x = torch.eye(9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (layer(x).mT - target).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("start", ["zero", "identity", "subtracted"])
def test_stella_stays_on_the_stiefel_manifold_and_descends(start):
    torch.manual_seed(0)
    layer = ThreeFactors(nn.Linear(9, 12).requires_grad_(False), 4, start)
    losses = descend(layer, StelLA([layer], 0.02, width=9), 100)
    assert losses[-1] < 0.9 * losses[0]
    for X in (layer.U, layer.V):
        torch.testing.assert_close(X.mT @ X, torch.eye(4), rtol=0, atol=1e-5)


def test_the_landing_field_is_the_formula_and_keeps_bases_near_orthonormal():
    torch.manual_seed(0)
    layer = ThreeFactors(nn.Linear(9, 12).requires_grad_(False), 4, "zero")
    optimizer = Landing([layer], 0.02, pull=0.5)
    with torch.no_grad():
        layer.U.mul_(1.1)
        layer.S.normal_()
    layer(torch.randn(5, 9)).square().sum().backward()
    G, X = layer.U.grad.clone(), layer.U.detach().clone()
    optimizer.step()
    skew = (G @ X.mT - X @ G.mT) / 2
    expected = skew @ X + 0.5 * X @ (X.mT @ X - torch.eye(4))
    torch.testing.assert_close(layer.U.grad, expected)
    losses = descend(layer, optimizer, 200)
    assert losses[-1] < 0.9 * losses[0]
    assert float((layer.U.mT @ layer.U - torch.eye(4)).abs().max()) < 0.3


def test_stable_rank_is_that_of_what_the_adapter_adds():
    torch.manual_seed(0)
    base = Transformer(20, 16)
    model = copy.deepcopy(base)
    layers = METHODS["LoRA, AdamW"].put(model, 3)
    expected = []
    for layer in layers:
        assert isinstance(layer, LoRA)
        nn.init.normal_(layer.B)
        s = torch.linalg.svdvals(layer.B @ layer.A)
        expected.append(float((s.square().sum() / s[0].square()).detach()))
    with torch.no_grad():
        found = runner.stable_rank(model, base)
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_the_search_ends_and_the_table_names_what_was_not_run(monkeypatch, tmp_path):
    calls: list = []

    def fake(method, rank, lr, seed):
        calls.append((method, rank, lr, seed))
        far = abs(torch.tensor(lr / 0.03).log2().item())
        return {
            **dict(zip(("method", "rank", "lr", "seed"), calls[-1], strict=True)),
            "before": 3.0, "validation": 2 + 0.1 * far, "test": 2 + 0.1 * far + 0.01 * seed,
            "trained": 100, "stable_rank": 2.0, "step_ms": 10.0, "processor": "p", "torch": "t",
        }  # fmt: skip

    monkeypatch.setattr(runner, "train", fake)
    runs = runner.Runs(tmp_path / "lines.jsonl")
    for seed in (0, 1):
        runs.get("LoRA, AdamW", 4, runs.best("LoRA, AdamW", 4), seed)
    again = runner.Runs(tmp_path / "lines.jsonl")
    lines = list(table.table(again))
    assert sum("not run" in line for line in lines) == len(lines) - 3
    count = len(calls)
    runner.everything(again)
    assert len(calls) > count
    assert len(set(calls)) == len(calls)
    lines = list(table.table(again))
    assert not any("not run" in line or "\\*" in line for line in lines)
    assert all("+0.0%" in line for line in lines if line.startswith("| LoRA, AdamW"))
    table.write(again)
    assert (tmp_path / "lines.md").exists()


def test_the_two_texts_share_an_alphabet():
    first, second = runner.texts()
    assert first[3] == second[3]
    assert max(int(part.max()) for part in (*first[:3], *second[:3])) < first[3]
