"""README and docs say what was measured, and the demo uses what was chosen on validation images."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from doc_code import ROOT

# `benchmarks` stands beside the package and is not installed.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import docs_numbers, readme_example
from lrmanifold.experiments.demo import CHOSEN


def test_pages_say_what_was_measured(capsys):
    assert docs_numbers.main("check") == 0, capsys.readouterr().out


def test_a_changed_number_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(docs_numbers, "cell", lambda values, digits=1: "12.3")
    assert docs_numbers.main("check") == 1
    assert "README.md" in capsys.readouterr().out


def test_rows_of_an_earlier_plan_do_not_count(tmp_path, monkeypatch):
    """They stay in the file when a plan is changed, and its page leaves them out."""
    folder = docs_numbers.FOLDER / "robustness" / docs_numbers.MNIST
    before = docs_numbers.attacked(docs_numbers.MNIST)
    copy = shutil.copytree(folder, tmp_path / "robustness" / docs_numbers.MNIST) / "runs.jsonl"
    row = json.loads(copy.read_text(encoding="utf-8").splitlines()[0])
    row |= {"key": "older", "plan": "older", "diverged": True}
    with open(copy, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    monkeypatch.setattr(docs_numbers, "FOLDER", tmp_path)
    assert docs_numbers.attacked(docs_numbers.MNIST) == before


@pytest.mark.parametrize("method", CHOSEN)
def test_the_demo_uses_the_settings_that_were_chosen(method):
    path = ROOT / "benchmarks" / "results" / "demo_settings.json"
    chosen = json.loads(path.read_text(encoding="utf-8"))["results"][method]
    assert (chosen["lr"], chosen["weight_decay"]) == CHOSEN[method]
    tried = chosen["tries"]
    rates = {t["lr"] for t in tried}
    assert min(rates) < chosen["lr"] < max(rates)
    assert chosen["weight_decay"] < max(t["weight_decay"] for t in tried)


def test_the_example_uses_the_settings_that_were_chosen():
    found = readme_example.stored()
    chosen = readme_example.choices(found["trials"])
    for side in ("example", readme_example.TWIN):
        assert found[side]["chosen"] == chosen[side]
    code = readme_example.example()
    ours = chosen["example"]
    optimizer = readme_example.OPTIMIZERS[ours["optimizer"]]
    for name in ("lr", "weight_decay"):
        optimizer = optimizer.replace(f"{name}=0", f"{name}={ours[name]:g}")
    assert f"optimizer = lrm.optim.{optimizer}\n" in code
    assert f"tau={readme_example.TAUS[ours['variant']]}," in code


def test_the_best_of_every_variant_lies_inside_its_grid():
    for tried in readme_example.stored()["trials"].values():
        for done in tried.values():
            top = readme_example.best(done)
            for name in ("lr", "weight_decay"):
                values = {t[name] for t in done}
                assert min(values) < top[name] < max(values)


def test_the_variants_of_adamw_tried_the_same_settings():
    grids = [
        [(t["lr"], t["weight_decay"]) for t in done]
        for done in readme_example.stored()["trials"]["AdamW"].values()
    ]
    assert all(grid == grids[0] for grid in grids)


def test_the_twin_of_the_example_differs_by_the_line_that_factorizes():
    codes = readme_example.sides()
    ours, dense = (codes[side].splitlines() for side in ("example", "dense twin"))
    assert [line for line in ours if "factorize" not in line] == dense
    assert len(ours) == len(dense) + 1


def test_no_test_image_takes_part_in_the_choice(monkeypatch):
    seen, (train, test) = [], readme_example.split()

    def look(code, lr, decay, seed, some, held_out):
        seen.append((set(some.tolist()), set(held_out.tolist())))
        return dict.fromkeys(readme_example.STRENGTHS, 0.5), 0

    monkeypatch.setattr(readme_example, "run", look)
    readme_example.trial("", 0.1, 0.01)
    for some, held_out in seen:
        assert not some & held_out
        assert some | held_out == set(train.tolist())
        assert not (some | held_out) & set(test.tolist())
    assert set.union(*(held_out for _, held_out in seen)) == set(train.tolist())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700
