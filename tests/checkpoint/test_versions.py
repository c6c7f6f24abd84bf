"""Files of older versions are read as what they meant."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold import checkpoint
from lrmanifold.checkpoint import CheckpointError, _file


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_convolutions_of_version_1_are_brought_to_the_present_order(tmp_path, name):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / name
    torch.manual_seed(0)
    source, other = (nn.Sequential(lrm.nn.LowRankConv2d(6, 8, 3, rank=4)) for _ in range(2))
    old = copy.deepcopy(source)
    M, X = source[0].manifold, source[0].weight.detach()
    U, S, V = M.unpack(X)
    V = V.unflatten(-2, (9, 6)).transpose(-3, -2).flatten(-3, -2)  # the channels first
    with torch.no_grad():
        old[0].weight.copy_(M.pack(U, S, V))
    optimizer = lrm.optim.CondLR(old.parameters(), lr=0.1)
    checkpoint.save(path, old, optimizer if path.suffix == ".pt" else None)
    _pretend_version_1(path)
    checkpoint.load(path, other)
    assert torch.equal(other[0].weight, X)
    if path.suffix == ".pt":
        with pytest.raises(CheckpointError, match="load without optimizer"):
            checkpoint.load(path, other, lrm.optim.CondLR(other.parameters(), lr=0.1))
    # A state dict of torch's own carries the version of each module.
    state = old.state_dict()
    state._metadata["0"]["version"] = 1
    torch.save(state, tmp_path / "plain.pt")
    third = copy.deepcopy(old)
    checkpoint.load(tmp_path / "plain.pt", third)
    assert torch.equal(third[0].weight, X)


def _pretend_version_1(path) -> None:
    if path.suffix == ".pt":
        torch.save({**torch.load(path, weights_only=True), "version": 1}, path)
        return
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["lrmanifold seal"]  # it came with version 3
    header = json.loads(metadata[_file._KEY])
    metadata[_file._KEY] = json.dumps({**header, "version": 1})
    save_file(load_file(path), path, metadata=metadata)
