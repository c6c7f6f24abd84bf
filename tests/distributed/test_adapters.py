"""Adapters under DDP: one process and two train the same ones; the base is not touched."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from workers import launch

import lrmanifold as lrm

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def adapted(seed: int) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    torch.manual_seed(seed)  # the adapter's start differs between ranks; DDP takes rank 0's
    return lrm.nn.adapt(base, 2, alpha=4, include=["0", "2"])


def steps(model: nn.Module, rank: int = 0, world: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = lrm.optim.CondLRAdam(trained, lr=0.05)
    for _ in range(10):
        x = torch.randn(8, 6, dtype=torch.float64, generator=generator)
        part = x.chunk(world)[rank]
        optimizer.zero_grad()
        (model(part) - part[:, :3]).square().mean().backward()
        optimizer.step()
    return model


def worker(rank, world, folder) -> None:
    model = nn.parallel.DistributedDataParallel(adapted(rank))
    state = lrm.nn.trained_state_dict(steps(model, rank, world).module)
    torch.save(state, folder / f"adapter-{rank}.pt")


@pytest.mark.parametrize("world", [1, 2])
def test_processes_train_the_adapters_of_one(tmp_path, world):
    launch(worker, world, tmp_path)
    alone = adapted(0)
    frozen = copy.deepcopy(alone[0].base_layer.weight)
    expected = lrm.nn.trained_state_dict(steps(alone))
    assert torch.equal(alone[0].base_layer.weight, frozen)
    found = [torch.load(tmp_path / f"adapter-{rank}.pt") for rank in range(world)]
    for state in found:
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(state[key], found[0][key]), key
            torch.testing.assert_close(state[key], value.detach(), rtol=1e-8, atol=1e-8)
