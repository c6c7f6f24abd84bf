"""The robustness benchmark: its files parse, a killed run repeats nothing, the report builds."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from fnmatch import fnmatch

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")

from benchmarks import models
from benchmarks.robustness import attacks, experiment, training
from benchmarks.robustness.__main__ import CONFIGS, chosen
from benchmarks.robustness.display import Display
from benchmarks.robustness.methods import start
from benchmarks.robustness.runner import Runner
from benchmarks.robustness.table import Table

TINY = {
    "data": "digits",
    "model": "mlp",
    "epochs": 3,
    "batch_size": 32,
    "samples": 300,
    "exclude": ["fc3"],
    "seeds": [0, 1],
    "reference": "dense SGD",
    "tuning": {
        "sgd": [0.1, 0.2],
        "adam": [0.001, 0.002],
        "dlrt": [0.2, 0.4],
        "samples": 100,
        "validation": 0.2,
    },
    "attacks": {
        "fgsm": [0.06],
        "pgd": [0.06],
        "pgd_l2": [0.5],
        "transfer": [0.1],
        "steps": 2,
        "images": 20,
        "masking_images": 10,
        "condition_images": 3,
    },
    "ranks": {"low": {"fc1": 8, "fc2": 8}},
    "method": [
        {"name": "dense SGD", "kind": "dense"},
        {"name": "dense, SVD-truncated", "kind": "svd", "rank": "low"},
        {"name": "A Bᵀ", "kind": "factors", "rank": "low"},
        {"name": "CondLR τ=0.1", "kind": "condlr", "rank": "low", "tau": 0.1},
    ],
}
EVERY_KIND = [
    {"kind": "dense"},
    {"kind": "spectral_norm"},
    {"kind": "orthogonal"},
    {"kind": "factors", "orthogonality": 0.01},
    {"kind": "condlr", "tau": 0.1},
    {"kind": "condlr", "tau": 0.1, "optimizer": "adam"},
    {"kind": "condlr", "penalty": 0.05},
    {"kind": "dlrt"},
    {"kind": "robust_dlrt", "penalty": 0.05, "tol": 0.1, "s_steps": 3},
    {"kind": "capped_dlrt", "tau": 0.5, "tol": 0.1, "s_steps": 3},
]


def tiny_runs(methods=None):
    raw = TINY if methods is None else {**TINY, "reference": methods[0]["name"], "method": methods}
    return experiment.parse(raw, "tiny")


def runner(folder, **options):
    return Runner(folder / "results", folder / "scratch", **options)


def test_every_file_of_the_configs_parses():
    found = {path.stem: experiment.load(path) for path in sorted(CONFIGS.glob("*.toml"))}
    assert {"digits", "mnist", "fashion", "cifar-vgg16"} <= set(found)
    for parsed in found.values():
        keys = [run.row_key for run in parsed.runs()]
        assert len(set(keys)) == len(keys) > 0
        assert all(run.training.model in models.NAMES for run in parsed.runs())
    assert {path.stem for path in chosen([], full=False)} <= set(found)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"epoch": 3}, "epoch"),
        ({"method": []}, "method"),
        ({"method": [{"name": "a", "kind": "magic"}]}, "magic"),
        ({"method": [{"name": "a", "kind": "condlr", "rank": "none"}]}, "none"),
        ({"tuning": {"sgd": [0.1]}}, "budget"),
        ({"reference": "nobody"}, "nobody"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(change, word):
    with pytest.raises(experiment.ConfigError, match=word):
        experiment.parse({**TINY, **change}, "wrong")


@pytest.mark.parametrize("settings", EVERY_KIND, ids=lambda s: "-".join(map(str, s.values())))
def test_a_killed_run_continues_to_the_same_weights(settings, tmp_path):
    low = {} if settings["kind"] in ("dense", "spectral_norm", "orthogonal") else {"rank": "low"}
    methods = [{"name": "one", "lr": 0.05, **low, **settings}]
    run = next(iter(tiny_runs(methods).runs()))
    data = runner(tmp_path).dataset(run)
    whole = training.train(run, data, 0.05, None)
    seen: list[int] = []

    def stop_in_the_second_epoch(done: int, total: int) -> None:
        seen.append(done)
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(run, data, 0.05, tmp_path, on_batch=stop_in_the_second_epoch)
    again: list[int] = []
    resumed = training.train(run, data, 0.05, tmp_path, on_batch=lambda done, _: again.append(done))
    assert min(again) > min(seen)  # the first epoch is not repeated
    assert resumed.history.loss == pytest.approx(whole.history.loss, rel=1e-5)
    weights = resumed.trainee.model.state_dict()
    for name, value in whole.trainee.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_finished_rows_are_skipped_and_the_report_builds(tmp_path):
    parsed = tiny_runs()
    with Display(quiet=True) as display:
        assert not runner(tmp_path, minutes=0.0).go([parsed], display)
        assert runner(tmp_path).go([parsed], display)
        table = Table(tmp_path / "results" / "runs.jsonl")
        rows = table.rows()
        begin = time.perf_counter()
        assert runner(tmp_path).go([parsed], display)
    assert time.perf_counter() - begin < 1
    assert table.rows() == rows
    assert len(rows) == 8
    for row in rows:
        assert row["tuning"]["runs"] == 2
        assert {"versions", "processor", "commit"} <= set(row["conditions"])
        assert row["pgd"]["0.06"] <= row["clean"]["accuracy"] + 0.5
    dense, svd = rows[0], rows[1]
    assert svd["parameters"]["folded_share"] < 0.5 < dense["parameters"]["folded_share"]
    assert svd["multiply_adds"] < dense["multiply_adds"]
    assert dense["condition"]["ratio"]["max"] <= 1.0
    pytest.importorskip("jinja2")
    from benchmarks.report.page import render

    html, markdown = (path.read_text() for path in render(rows, tmp_path / "results"))
    for word in ("CondLR τ=0.1", "Paired by seed", "Would gradient masking show", "Published"):
        assert word in html
        assert word in markdown
    # Beside a published figure stands every setting of that name, with its length and size.
    from benchmarks.report import groups, published, tables

    longer = [{**row, "training": {**row["training"], "epochs": 9}} for row in rows]
    both = [*groups.gather(rows)["tiny"], *groups.gather(longer)["tiny"]]
    line = published.Figure("A Bᵀ", "80 %", (88.1, 64.2), ("A Bᵀ",))
    found = tables.beside("", ("clean", "0.06"), [line], both, "").rows
    names = ["A Bᵀ (published)", "A Bᵀ (ours, 3 epochs)", "A Bᵀ (ours, 9 epochs)"]
    assert [row[0] for row in found] == names


def test_a_torn_last_line_costs_one_row_only(tmp_path):
    table = Table(tmp_path / "rows.jsonl")
    table.append({"key": "a", "value": math.nan})
    with open(table.path, "a") as file:
        file.write('{"key": "b", "val')
    table.append({"key": "c", "value": 1.0})
    assert table.rows() == [{"key": "a", "value": None}, {"key": "c", "value": 1.0}]
    assert len(table.path.read_text().splitlines()) == 3


def test_settings_make_the_key_and_names_do_not():
    run = next(iter(tiny_runs().runs()))
    renamed = dataclasses.replace(run, method=dataclasses.replace(run.method, name="other"))
    other = dataclasses.replace(run, seed=5)
    assert renamed.key == run.key != other.key
    assert renamed.row_key != run.row_key
    json.dumps(run.settings())


def test_fast_gradient_equals_fgsm_at_each_strength():
    from lrmanifold.robustness import accuracy_under_attack, fgsm

    run = next(iter(tiny_runs().runs()))
    data = Runner(CONFIGS, CONFIGS).dataset(run)
    model = start(run, data, 0.1, "cpu").model
    pair = (data.test_x[:64], data.test_y[:64])
    for options in ({}, {"norm": "l2"}, {"clip": None}):
        found = attacks.fast_gradient(model, pair, [0.05, 0.1], **options)
        expected = accuracy_under_attack(model, pair, fgsm, [0.05, 0.1], **options)
        assert list(found.values()) == pytest.approx(list(expected.values()))


@pytest.mark.parametrize("name", ["cifar-cpu", "cifar-vgg16", "cifar-wrn16-4", "cifar-vit"])
def test_settings_named_by_what_they_save_save_it(name):
    """In per cent of all parameters, cores folded in."""
    data = Runner(CONFIGS, CONFIGS).dataset(next(iter(tiny_runs().runs())))
    wide = dataclasses.replace(data, train_x=torch.zeros(1, 3, 32, 32))
    seen = 0
    for run in experiment.load(CONFIGS / f"{name}.toml").runs():
        if run.seed or not run.method.name.endswith(" %"):
            continue
        with torch.device("meta"):
            network = models.build(run.training.model, wide)
        whole = left = sum(p.numel() for p in network.parameters())
        ((pattern, share),) = run.ranks.items()
        for key, layer in network.named_modules():
            if fnmatch(key, pattern) and isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                m, n = len(layer.weight), layer.weight[0].numel()
                left -= m * n - round(share * min(m, n)) * (m + n)
        said = float(run.method.name.split(", ")[-1].removesuffix(" %"))
        assert abs(100 * (1 - left / whole) - said) <= 1.0, run.method.name
        seen += 1
    assert seen


@pytest.mark.parametrize("name", ["vgg16", "wrn16_4", "vit"])
def test_large_networks_convert_and_keep_their_shape(name):
    import lrmanifold as lrm

    data = Runner(CONFIGS, CONFIGS).dataset(next(iter(tiny_runs().runs())))
    wide = dataclasses.replace(data, train_x=torch.zeros(1, 3, 32, 32))
    with torch.device("meta"):
        network = models.build(name, wide)
        before = sum(p.numel() for p in network.parameters())
        lrm.factorize(network, rank=0.2, tau=0.1, exclude="fc")
        assert sum(p.numel() for p in network.parameters()) < 0.5 * before
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
