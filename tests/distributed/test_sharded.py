"""FSDP2: packed weights in shards train as whole ones do, and their checkpoints travel."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from workers import launch, network, optimizer_for, plain_state, save, single, train, weights

import lrmanifold as lrm

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def shard(model, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        if isinstance(layer, lrm.nn.LowRankLayer):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_worker(rank, world, folder, kind, steps, spoil):
    model = shard(network(), world)
    optimizer = optimizer_for(model, kind)
    train(model, optimizer, steps, rank, world, spoil=spoil)
    held = sum(p.to_local().numel() for p in model.parameters())
    moments = sum(
        v.to_local().numel()
        for state in optimizer.state.values()
        for v in state.values()
        if hasattr(v, "to_local")
    )
    save(folder, rank, model, optimizer)
    torch.save([held, moments], folder / f"size-{rank}.pt")


@pytest.mark.parametrize(
    ("kind", "world", "steps", "spoil"),
    [
        ("CondLR", 2, 30, None),
        pytest.param("CondLR", 2, 200, None, marks=pytest.mark.slow),
        pytest.param("CondLR", 4, 15, None, marks=pytest.mark.slow),
        ("CondLRAdam", 2, 30, None),
        pytest.param("CondLRMuon", 2, 30, None, marks=pytest.mark.slow),
        ("CondLR", 2, 10, 4),
    ],
)
def test_sharded_weights_train_as_one_process_does(tmp_path, kind, world, steps, spoil):
    launch(fsdp_worker, world, tmp_path, kind, steps, spoil)
    model, optimizer = single(kind, steps, spoil)
    first, *others = [
        torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(world)
    ]
    for state, _ in others:
        assert all(torch.equal(state[key], value) for key, value in first[0].items())
    for key, value in weights(model).items():
        torch.testing.assert_close(first[0][key], value, rtol=1e-5, atol=1e-5)
    for found, own in zip(first[1], plain_state(optimizer), strict=True):
        assert int(found["step"]) == int(own["step"])
        assert int(found["skipped"]) == int(own["skipped"])
    # Every process holds its share of weights and momenta, up to rows that do not divide.
    total = sum(p.numel() for p in model.parameters())
    for rank in range(world):
        held, moments = torch.load(tmp_path / f"size-{rank}.pt")
        assert held <= total / world * 1.35 + 20
        assert 0 < moments <= held * (1 if kind == "CondLR" else 2)


def partly_spoiled_worker(rank, world, folder):
    """NaN in the rows of one process only: all of them have to skip that parameter."""
    model = shard(network(), world)
    optimizer = optimizer_for(model)
    train(model, optimizer, 1, rank, world)
    before = weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for p in (model[7].bias, model[5].weight):
        if rank == 0:
            p.grad.to_local().view(-1)[:1] = torch.nan
    optimizer.step()
    after = weights(model)
    for name in ("7.bias", "5.weight"):
        assert torch.equal(before[name], after[name])
    skipped = {name: int(optimizer.state[p]["skipped"]) for name, p in model.named_parameters()}
    assert skipped == {name: int(name in ("7.bias", "5.weight")) for name in skipped}


def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_by_all(tmp_path):
    launch(partly_spoiled_worker, 2, tmp_path)


def refusing_worker(rank, world, folder):
    model = shard(network(), world)
    optimizer = optimizer_for(model)
    train(model, optimizer, 1, rank, world)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["3.weight"] = state["3.weight"] * 2.0
    with pytest.raises(RuntimeError, match=r"3\.weight is not a point of"):
        model.load_state_dict(state)
    with torch.no_grad():
        model[3].weight.to_local().mul_(2.0)  # somebody wrote to it
    train(model, optimizer, 0)
    with pytest.raises(lrm.GeometryError, match="is not on its manifold"):
        train(model, optimizer, 1, rank, world)


def test_sharded_weights_off_their_manifold_are_refused(tmp_path):
    launch(refusing_worker, 2, tmp_path)


def momentum_worker(rank, world, folder):
    model = shard(network(), world)
    optimizer = optimizer_for(model)
    train(model, optimizer, 3, rank, world)
    found = [optimizer.momentum(p).full_tensor() for p in model.parameters()]
    torch.save(found, folder / f"momentum-{rank}.pt")


def test_the_momentum_of_a_sharded_weight_is_sharded_like_it(tmp_path):
    launch(momentum_worker, 2, tmp_path)
    model, optimizer = single(steps=3)
    for rank in range(2):
        found = torch.load(tmp_path / f"momentum-{rank}.pt")
        for p, momentum in zip(model.parameters(), found, strict=True):
            torch.testing.assert_close(momentum, optimizer.momentum(p), rtol=1e-9, atol=1e-9)


# -- torch.distributed.checkpoint


def options():
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions()


def dcp_save_worker(rank, world, folder, sharded, kind):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = shard(network(), world) if sharded else network()
    optimizer = optimizer_for(model, kind)
    train(model, optimizer, 5, rank, world)
    state, moments = get_state_dict(model, optimizer, options=options())
    dcp.save({"model": state, "optimizer": moments}, checkpoint_id=folder / "dcp")
    train(model, optimizer, 5, rank, world, first=5)
    save(folder, rank, model, optimizer)


def dcp_load_worker(rank, world, folder, sharded, kind):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = shard(network(seed=5), world) if sharded else network(seed=5)
    optimizer = optimizer_for(model, kind)
    state, moments = get_state_dict(model, optimizer, options=options())
    found = {"model": state, "optimizer": moments}
    dcp.load(found, checkpoint_id=folder / "dcp")
    set_state_dict(
        model,
        optimizer,
        model_state_dict=found["model"],
        optim_state_dict=found["optimizer"],
        options=options(),
    )
    for layer in model:
        if isinstance(layer, lrm.nn.LowRankLayer):
            assert layer.weight.manifold is layer.manifold
    train(model, optimizer, 5, rank, world, first=5)
    save(folder, rank, model, optimizer)


@pytest.mark.parametrize(
    ("world", "sharded", "kind"),
    [
        (1, True, "CondLR"),
        (1, False, "CondLR"),
        (4, True, "CondLRAdam"),
        pytest.param(4, True, "CondLR", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_2_processes_goes_on_in_1_and_in_4(tmp_path, world, sharded, kind):
    launch(dcp_save_worker, 2, tmp_path, True, kind)
    whole, moments = torch.load(tmp_path / "rank-0.pt", weights_only=True)
    launch(dcp_load_worker, world, tmp_path, sharded, kind)
    for rank in range(world):
        found, own = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        for key, value in whole.items():
            torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)
        for a, b in zip(own, moments, strict=True):
            assert a.keys() == b.keys()
            assert int(a["step"]) == 10
            for key in a:
                torch.testing.assert_close(a[key], b[key])
