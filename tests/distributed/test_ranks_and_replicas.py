"""Ranks that change and several gradients a step under DDP; replicas that differ."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from workers import batch, launch, network, optimizer_for, weights

import lrmanifold as lrm
from lrmanifold.optim import DLRT, RankScheduler

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def wrapped(rank, **options):
    model = copy.deepcopy(network(seed=0 if rank == 0 else 99))
    return nn.parallel.DistributedDataParallel(model, **options)


def dlrt_steps(model, optimizer, steps, rank=0, world=1) -> None:
    for step in range(steps):
        x, y = (part.chunk(world)[rank] for part in batch(step))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def dlrt_worker(rank, world, folder, integrator, options):
    model = wrapped(rank, **options)
    optimizer = DLRT(model.parameters(), lr=0.05, integrator=integrator)
    dlrt_steps(model, optimizer, 5, rank, world)
    torch.save(weights(model), folder / f"rank-{rank}.pt")


@pytest.mark.parametrize("integrator", ["bug", "ksl"])
@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_dlrt_under_ddp_is_dlrt_in_one_process(tmp_path, integrator, options):
    launch(dlrt_worker, 2, tmp_path, integrator, options)
    one, other = (torch.load(tmp_path / f"rank-{r}.pt", weights_only=True) for r in range(2))
    model = network()
    optimizer = DLRT(model.parameters(), lr=0.05, integrator=integrator)
    dlrt_steps(model, optimizer, 5)
    for key, value in weights(model).items():
        assert torch.equal(one[key], other[key])
        torch.testing.assert_close(one[key], value, rtol=1e-8, atol=1e-8)


def augmented_worker(rank, world, folder, options):
    model = wrapped(rank, **options)
    optimizer = DLRT(model.parameters(), lr=0.05, integrator="augmented_bug")
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"within\s+DistributedDataParallel"):
        dlrt_steps(model, optimizer, 1, rank, world)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_what_ddp_cannot_follow_is_refused_at_the_first_step(tmp_path, options):
    launch(augmented_worker, 2, tmp_path, options)


def scheduler_worker(rank, world, folder):
    model = wrapped(rank)
    optimizer = optimizer_for(model)
    scheduler = RankScheduler(
        model, optimizer, tol=0.5, coefficient_steps=2, coefficient_lr=0.1, min_rank=1
    )
    x, y = (part.chunk(world)[rank] for part in batch(0))

    def closure():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()

    closure()
    optimizer.step()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"within\s+DistributedDataParallel"):
        scheduler.step(closure)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    state = copy.deepcopy(model.state_dict())
    M = model.module[3].manifold
    narrow = lrm.WellConditioned(M.m, M.n, 2, tau=0.1).random(dtype=torch.float64)
    state["module.3.weight"] = narrow.as_subclass(torch.Tensor)
    with pytest.raises(RuntimeError, match=r"within\s+DistributedDataParallel"):
        model.load_state_dict(state)
    assert M.point_shape == tuple(model.module[3].weight.shape)  # refused: as it was
    closure()


def test_ranks_under_ddp_are_refused_by_name(tmp_path):
    launch(scheduler_worker, 2, tmp_path)


# -- shared out steps of ranks that do not mean the same


def other_set_worker(rank, world, folder):
    model = network()
    optimizer = optimizer_for(model, distribute=True)
    for i, p in enumerate(model.parameters()):
        if not (rank == 1 and i == 2):
            p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="needs gradients for the same parameters"):
        optimizer.step()


def other_seed_worker(rank, world, folder):
    model = network(seed=rank)
    optimizer = optimizer_for(model, distribute=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(RuntimeError, match="needs the same weights on every rank, got others in"):
        optimizer.step()


@pytest.mark.parametrize("worker", [other_set_worker, other_seed_worker])
def test_ranks_that_do_not_mean_the_same_weights_are_told(tmp_path, worker):
    launch(worker, 2, tmp_path)


def test_off_the_manifold_on_one_rank_raises_on_all(tmp_path):
    launch(one_off_worker, 2, tmp_path)


def one_off_worker(rank, world, folder):
    model = network()
    optimizer = optimizer_for(model, distribute=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    if rank == 1:
        with torch.no_grad():
            model[3].weight.add_(1.0)
    with pytest.raises(lrm.GeometryError, match="is not on its manifold"):
        optimizer.step()
