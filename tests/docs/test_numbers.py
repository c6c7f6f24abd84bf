"""README and docs say what was measured, and the demo uses what was chosen on validation images."""

from __future__ import annotations

import json
import sys

import pytest
from doc_code import ROOT

# `benchmarks` stands beside the package and is not installed.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import docs_numbers
from lrmanifold.experiments.demo import CHOSEN


def test_pages_say_what_was_measured(capsys):
    assert docs_numbers.main("check") == 0, capsys.readouterr().out


def test_a_changed_number_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(docs_numbers, "cell", lambda values, digits=1: "12.3")
    assert docs_numbers.main("check") == 1
    assert "README.md" in capsys.readouterr().out


@pytest.mark.parametrize("method", CHOSEN)
def test_the_demo_uses_the_settings_that_were_chosen(method):
    path = ROOT / "benchmarks" / "results" / "demo_settings.json"
    chosen = json.loads(path.read_text(encoding="utf-8"))["results"][method]
    assert (chosen["lr"], chosen["weight_decay"]) == CHOSEN[method]
    tried = chosen["tries"]
    rates = {t["lr"] for t in tried}
    assert min(rates) < chosen["lr"] < max(rates)
    assert chosen["weight_decay"] < max(t["weight_decay"] for t in tried)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700
