"""Checkpoints of the newer layers: there and back, and from the dense model by SVD."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold import checkpoint


class Net(nn.Module):
    def __init__(self, **attention) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **attention)
        self.up = nn.ConvTranspose1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        sizes = (16, self.attention.kdim, self.attention.vdim)
        args = (x.repeat(1, 1, 2)[..., :n] for n in sizes)
        return self.head(self.up(self.attention(*args)[0].mT).mT)


def factorized(rank=16, **attention):
    return lrm.factorize(
        Net(**attention).double(),
        rank,
        tau=None,
        keep_larger=True,
        include=["*", "embed"],
        exclude="*.k_proj",
    )


@pytest.mark.parametrize("attention", [{}, {"kdim": 20, "vdim": 24}, {"bias": False}], ids=str)
def test_a_dense_file_goes_into_the_factorized_twin(tmp_path, attention):
    dense, ids = Net(**attention).double(), torch.randint(60, (2, 5))
    checkpoint.save(tmp_path / "dense.pt", dense)
    model = factorized(**attention)
    with pytest.raises(checkpoint.CheckpointError, match=r"q_proj\.weight' is a dense weight"):
        checkpoint.load(tmp_path / "dense.pt", model)
    found = checkpoint.load(tmp_path / "dense.pt", model, dense="svd")
    assert set(found.from_dense) == {
        "embed.weight",
        "head.weight",
        "up.weight",
        *(f"attention.{p}_proj.weight" for p in ("q", "v", "out")),
    }
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(ids), dense(ids))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_of_the_layers_come_back_at_their_ranks(tmp_path, suffix):
    pytest.importorskip("safetensors")
    model, ids = factorized(4), torch.randint(60, (2, 5))
    path = tmp_path / f"model.{suffix}"
    checkpoint.save(path, model)
    other = factorized(3)
    checkpoint.load(path, other)
    assert other.attention.q_proj.rank == other.up.rank == other.embed.rank == 4
    assert other.head.weight is other.embed.weight
    torch.testing.assert_close(other(ids), model(ids))


def test_an_optimizer_goes_on_where_it_was(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        model(ids).square().mean().backward()
        optimizer.step()

    ids = torch.randint(60, (4, 5))
    model = factorized(4)
    optimizer = lrm.optim.CondLRAdam(model.parameters(), lr=0.01)
    step(model, optimizer)
    checkpoint.save(tmp_path / "run.pt", model, optimizer)
    again = factorized(4)
    other = lrm.optim.CondLRAdam(again.parameters(), lr=0.01)
    checkpoint.load(tmp_path / "run.pt", again, other)
    for m, o in ((model, optimizer), (again, other)):
        step(m, o)
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-9, atol=1e-10)


def test_a_dense_conv1d_of_transformers_goes_into_its_twin(tmp_path, monkeypatch):
    class Conv1D(nn.Module):
        def __init__(self, nf, nx):
            super().__init__()
            self.nf, self.nx = nf, nx
            self.weight = nn.Parameter(torch.randn(nx, nf))
            self.bias = nn.Parameter(torch.randn(nf))

    if "transformers.pytorch_utils" not in sys.modules:
        fake = types.ModuleType("transformers.pytorch_utils")
        fake.Conv1D = Conv1D
        monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", fake)
    dense = nn.ModuleDict({"a": sys.modules["transformers.pytorch_utils"].Conv1D(12, 8)})
    checkpoint.save(tmp_path / "dense.pt", dense)
    model = nn.ModuleDict({"a": lrm.nn.LowRankTransposedLinear(12, 8, 8, tau=None)})
    checkpoint.load(tmp_path / "dense.pt", model, dense="svd")
    torch.testing.assert_close(model["a"].dense_weight(), dense["a"].weight, rtol=1e-4, atol=1e-4)
