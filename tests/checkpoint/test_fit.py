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


def tied_model(rank: int | None = 2, adapted: bool = False) -> nn.Module:
    """A table with a tied head, and two names for one layer, low-rank unless `rank` is None."""
    torch.manual_seed(rank or 0)
    model = nn.ModuleDict({"a": nn.Embedding(30, 12), "b": nn.Linear(12, 30, bias=False)})
    model["b"].weight = model["a"].weight
    model["c"] = model["d"] = nn.Linear(12, 12)
    if adapted:
        lrm.nn.adapt(model, 2, include="c")
    return model if rank is None else lrm.factorize(model, rank=rank, include=["a", "b", "c"])


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("other", [2, 3])
def test_keys_that_a_file_leaves_out_as_tied_are_not_missing(tmp_path, dense, other):
    """As ``safetensors.torch.save_model`` does."""
    packing = pytest.importorskip("safetensors.torch")
    source, model = tied_model(None if dense else 2), tied_model(other)
    packing.save_model(source, str(tmp_path / "a.safetensors"))
    found = checkpoint.load(tmp_path / "a.safetensors", model, dense="svd")
    assert not found.missing
    assert model["a"].weight is model["b"].weight
    assert model["c"] is model["d"]
    if not dense:
        assert model["a"].rank == model["b"].rank == 2
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    packing.save_file({"a.weight": source["a"].weight.detach()}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"'c.weight' is missing"):
        checkpoint.load(tmp_path / "b.safetensors", model, dense="svd")


def test_adapters_under_two_names_are_taken_from_one(tmp_path):
    packing = pytest.importorskip("safetensors.torch")
    source, model = tied_model(None, True), tied_model(None, True)
    with torch.no_grad():
        for p in source.parameters():
            if not hasattr(p, "manifold"):
                p.add_(1.0)
    packing.save_model(source, str(tmp_path / "a.safetensors"))
    checkpoint.load(tmp_path / "a.safetensors", model)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


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
