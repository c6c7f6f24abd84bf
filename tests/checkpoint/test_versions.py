"""Files of older versions are read as what they meant, or refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold import checkpoint
from lrmanifold.checkpoint import CheckpointError, _file


def network() -> nn.Sequential:
    return nn.Sequential(lrm.nn.LowRankConv2d(6, 8, 3, rank=4))


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("version", [1, 2])
def test_version_2_is_read_and_version_1_whose_convolutions_differ_is_not(tmp_path, name, version):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    path, source, other = tmp_path / name, network(), network()
    checkpoint.save(path, source)
    _pretend_version(path, version)
    before = other[0].weight.detach().clone()
    if version == 1:
        with pytest.raises(CheckpointError, match="has version 1, which no release wrote"):
            checkpoint.load(path, other)
    else:
        checkpoint.load(path, other)
    assert torch.equal(other[0].weight, before if version == 1 else source[0].weight)


def test_the_version_of_a_dense_layer_in_a_plain_file_changes_no_weight(tmp_path):
    source, other = network(), network()
    state = nn.Sequential(nn.Conv2d(6, 8, 3)).state_dict()
    state.update(source.state_dict())
    assert state._metadata["0"]["version"] == 1
    torch.save(state, tmp_path / "plain.pt")
    checkpoint.load(tmp_path / "plain.pt", other)
    assert torch.equal(other[0].weight, source[0].weight)


def _pretend_version(path, version: int) -> None:
    if path.suffix == ".pt":
        torch.save({**torch.load(path, weights_only=True), "version": version}, path)
        return
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["lrmanifold seal"]  # it came with version 3
    header = json.loads(metadata[_file._KEY])
    metadata[_file._KEY] = json.dumps({**header, "version": version})
    save_file(load_file(path), path, metadata=metadata)
