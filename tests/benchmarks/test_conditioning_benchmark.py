"""Which conditioning counts: kernels, maps and folded norms are measured as they act."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")
from tiny_plan import TINY, write
from torch import nn

from benchmarks.models import plain_no_norm
from benchmarks.report import conditioning as page
from benchmarks.report.results import Group, Results
from benchmarks.robustness import conditioning
from benchmarks.robustness.plan import load
from lrmanifold import factorize
from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.factors import two_factors
from lrmanifold.experiments.models import plain
from lrmanifold.experiments.training import Normalized


def images(count=4):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(change=lambda network: network, seed=0):
    """`plain` with norms that are not the identity."""
    torch.manual_seed(seed)
    model = change(plain(widths=(8, 8, 8)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 2.0)
            nn.init.uniform_(module.running_var, 0.1, 2.0)
    return Normalized(model, data()).eval()


def data():
    y = torch.arange(4) % 10
    return Dataset("c", images(), y, images(), y, 10, tuple("0123456789"), (0.5,) * 3, (0.5,) * 3)


def test_the_values_of_the_map_are_those_of_the_convolution_with_all_pixels_in_a_row():
    kernel = torch.randn(
        3, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    basis = torch.eye(2 * 4 * 4, dtype=torch.float64).reshape(-1, 2, 4, 4)
    wrapped = nn.functional.pad(basis, (1, 1, 1, 1), mode="circular")
    matrix = nn.functional.conv2d(wrapped, kernel).flatten(1)
    ours = conditioning.map_values(kernel, 4, 2).sort(descending=True).values
    torch.testing.assert_close(ours, torch.linalg.svdvals(matrix))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net,
        lambda net: two_factors(net, {"conv*": 3}, exclude=("stem", "head")),
        lambda net: factorize(net, rank={"conv*": 3}, tau=0.0, exclude=("stem", "head")),
    ],
    ids=["dense", "factors", "condlr"],
)
def test_the_kernel_is_what_the_layer_applies(change):
    model = network(change)
    layer = model.network.conv2b
    kernel, rank = conditioning.kernel_of(layer)
    z = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.conv2d(z.double(), kernel, padding=1)
    torch.testing.assert_close(layer(z).double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.linalg.matrix_rank(kernel.flatten(1), rtol=1e-4) == rank


def test_a_bounded_kernel_need_not_stay_bounded_behind_its_norm():
    model = network(lambda n: factorize(n, rank={"conv*": 3}, tau=0.0, exclude=("stem", "head")))
    found = dict(conditioning.layers(model, images(2)))
    assert set(found) == {"stem", *(f"conv{b}{p}" for b in (1, 2, 3) for p in "ab")}
    for name in found.keys() - {"stem"}:
        assert found[name]["kernel"]["cond"] == pytest.approx(1.0, abs=1e-4)
        assert found[name]["folded kernel"]["cond"] > 1.05
        assert found[name]["folded map"]["cond"] > 1.05
    # by hand: the first scales the rows, the other is behind the pooling
    layer, norm = model.network.conv1a, model.network.norm1a
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    rows = layer.dense_weight().flatten(1) * scale[:, None]
    s = torch.linalg.svdvals(rows.detach())[:3]
    assert found["conv1a"]["folded kernel"]["cond"] == pytest.approx(float(s[0] / s[2]), rel=1e-4)


def test_without_batch_norm_nothing_is_folded_in():
    torch.manual_seed(0)
    bare = plain_no_norm()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in bare.modules())
    normed = {name: m for name, m in plain().named_children() if not name.startswith("norm")}
    assert [name for name, _ in bare.named_children()] == list(normed)
    assert all(m.bias is not None for m in bare.modules() if isinstance(m, nn.Conv2d))
    bounded = factorize(bare, rank={"conv*": 3}, tau=0.0, exclude=("stem", "head"))
    found = dict(conditioning.layers(Normalized(bounded, data()).eval(), images(2)))
    assert len(found) == 7
    for name, measures in found.items():
        assert measures["kernel"] == measures["folded kernel"], name
        assert measures["map"] == measures["folded map"], name


def test_networks_of_other_plans_and_those_that_are_gone_are_left_out(tmp_path, monkeypatch):
    folder = tmp_path / "tiny"
    digest = load(write(folder, TINY)).digest
    model = network()
    monkeypatch.setattr("benchmarks._shared.load", lambda name, root: data())
    rows = [("a", digest, 0), ("b", "other", 1), ("gone", digest, 2)]
    with open(folder / "runs.jsonl", "w") as file:
        for key, plan, seed in rows:
            row = {"key": key, "plan": plan, "family": "dense", "seed": seed}
            file.write(json.dumps(row) + "\n")
    for key in ("a", "b"):
        torch.save(model, tmp_path / f"{key}.network.pt")
    found = conditioning.measure(folder, tmp_path, None, images=2)
    assert [n["seed"] for n in found["networks"]] == [0]
    assert found["networks"][0]["network"] > 0


def test_the_page_ranks_measures_against_what_was_left(tmp_path):
    """The measure that falls as the worst case rises gets -1, one that is the same everywhere 0."""
    folder = tmp_path / "tiny"
    plan = load(write(folder, TINY))
    groups, networks = [], []
    for i, family in enumerate(plan.families[:3]):
        row = {"seed": 0, "worst": {"0.06": {"accuracy": 0.2 + 0.1 * i}}, "shares": [0.5]}
        groups.append(Group(family, [row]))
        layer = {m: {"cond": 9.0 - i, "middle": 2.0, "max": 1.0 + i} for m in conditioning.MEASURES}
        both = {"conv1": layer, "conv2": layer}
        networks.append({"family": family.name, "seed": 0, "layers": both, "network": 1.0 + i})
    results = Results(plan, [], groups)
    assert page.section(results, folder) == []
    (folder / "conditioning.json").write_text(
        json.dumps({"plan": plan.digest, "images": 5, "networks": networks})
    )
    text = "\n".join(page.section(results, folder))
    assert "| dense | 9 | 9 | 9 | 9 | 2 | 1 | 1 |" in text
    assert "with the worst case | -1.00 | -1.00 | -1.00 | -1.00 | – | +1.00 | +1.00 |" in text
    (folder / "conditioning.json").write_text(
        json.dumps({"plan": "other", "images": 5, "networks": networks})
    )
    assert page.section(results, folder) == []
