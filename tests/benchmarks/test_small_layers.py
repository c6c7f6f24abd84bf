"""The measurement of small layers compares what it says that it compares."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

import lrmanifold as lrm

# `benchmarks` stands beside the package and is not installed.
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small_layers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.small_layers")


@pytest.mark.slow
def test_both_networks_are_measured(monkeypatch, small_layers):
    monkeypatch.setattr(small_layers, "ROUNDS", 2)
    seen = []
    real = lrm.factorize
    monkeypatch.setattr(lrm, "factorize", lambda m, **o: seen.append(real(m, **o)) or seen[-1])
    row = small_layers.measure(16, 2, 8)
    assert [type(m).__name__ for m in seen[0]][::2] == ["LowRankLinear", "LowRankLinear", "Linear"]
    assert row["dense_ms"] > 0
    assert row["low_rank_ms"] > 0


def test_the_page_says_what_was_measured():
    path = ROOT / "benchmarks" / "results" / "small_layers.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    page = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    table = re.findall(
        r"^\| ([\d,]+) \| (\d+) \| (\d+) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|$", page, re.M
    )
    assert len(table) == len(rows)
    for (width, rank, batch, ratio), row in zip(table, rows, strict=True):
        case = int(width.replace(",", "")), int(rank), int(batch)
        assert case == (row["width"], row["rank"], row["batch"])
        assert abs(float(ratio) - row["ratio"]) <= 0.05
