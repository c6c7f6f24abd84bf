"""What a file must be like to fit a model: nothing is cast, tied or lost in silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold import checkpoint
from lrmanifold._sealed import write_torch
from lrmanifold.checkpoint import CheckpointError


def holding(value) -> nn.Module:
    module = nn.Module()
    module.register_buffer("x", value)
    return module


@pytest.mark.parametrize(
    ("saved", "own", "words"),
    [
        (torch.ones(2, dtype=torch.complex64), torch.ones(2), "of a type like torch.float32"),
        (torch.ones(2), torch.ones(2, dtype=torch.complex64), "of a type like torch.complex64"),
        (torch.ones(2), torch.ones(2, dtype=torch.int64), "of a type like torch.int64"),
        (torch.ones(2, dtype=torch.bool), torch.ones(2), "must be of a type like torch.float32"),
        (torch.ones(2), torch.ones(2, device="meta"), "is on the meta device here"),
        (torch.ones(2), torch.ones(3), r"must have shape \(3,\), got \(2,\)"),
    ],
)
def test_what_would_be_cast_or_dropped_is_named(tmp_path, saved, own, words):
    checkpoint.save(tmp_path / "a.pt", holding(saved))
    with pytest.raises(CheckpointError, match=f"'x' {words}" if "must" in words else words):
        checkpoint.load(tmp_path / "a.pt", holding(own))


def test_other_precisions_are_taken_unless_they_overflow(tmp_path):
    source = nn.Linear(2, 2).double()
    checkpoint.save(tmp_path / "a.pt", source)
    other = nn.Linear(2, 2).half()
    checkpoint.load(tmp_path / "a.pt", other)
    assert torch.equal(other.weight, source.weight.half())
    with torch.no_grad():
        source.weight[0, 0] = 1e6
    checkpoint.save(tmp_path / "a.pt", source)
    before = other.weight.clone()
    with pytest.raises(CheckpointError, match="'weight' holds Inf"):
        checkpoint.load(tmp_path / "a.pt", other)
    assert torch.equal(other.weight, before)


def test_a_file_without_ties_does_not_fit_a_model_with_them(tmp_path):
    def model(tied: bool) -> nn.Module:
        layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), lrm.nn.LowRankLinear(2, 2, 1))
        if tied:
            layers[1].weight = layers[0].weight
        return layers

    checkpoint.save(tmp_path / "a.pt", model(tied=False))
    words = "'1.weight' and '0.weight' are one tensor here, but not in the file"
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(tmp_path / "a.pt", model(tied=True))
    torch.save(model(tied=True).state_dict(), tmp_path / "tied.pt")  # twice the same values
    checkpoint.load(tmp_path / "tied.pt", model(tied=True))
    checkpoint.load(tmp_path / "tied.pt", model(tied=False))


def test_lazy_layers_take_what_the_file_has(tmp_path):
    source = nn.Sequential(nn.Linear(3, 2))
    checkpoint.save(tmp_path / "a.pt", source)
    lazy = nn.Sequential(nn.LazyLinear(2))
    checkpoint.load(tmp_path / "a.pt", lazy)
    assert torch.equal(lazy[0].weight, source[0].weight)


@pytest.mark.parametrize(
    "state",
    [
        {"state": [], "param_groups": []},
        {"state": {}, "param_groups": {"params": [0, 1]}},
        {"state": {}, "param_groups": [[0, 1]]},
        {"state": {}, "param_groups": [{"lr": 0.1}]},
        {"state": {}},
        [],
    ],
)
def test_what_is_no_state_of_an_optimizer_is_named(tmp_path, state):
    model = nn.Linear(2, 2)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    checkpoint.save(tmp_path / "a.pt", model, optimizer)
    raw = torch.load(tmp_path / "a.pt")
    write_torch(tmp_path / "a.pt", {**raw, "optimizer": state})
    with pytest.raises(CheckpointError, match=r"no state dict of an optimizer|holds no optimizer"):
        checkpoint.load(tmp_path / "a.pt", model, optimizer)
