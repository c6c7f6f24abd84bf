"""DDP: the same weights to the bit on every rank, and those of one process; work shared out."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from workers import launch, network, optimizer_for, replica, save, single, train, weights

from lrmanifold.errors import GeometryError
from lrmanifold.optim.distributed import assign

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def ddp_worker(rank, world, folder, kind, options, steps, spoil):
    model = replica(rank)
    optimizer = optimizer_for(model, kind, **options)
    train(model, optimizer, steps, rank, world, spoil=spoil)
    save(folder, rank, model, optimizer)


def results(folder, world):
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(world)]


def assert_ranks_agree_and_equal(folder, world, model, optimizer, tol) -> None:
    first, *others = results(folder, world)
    for state, moments in others:
        for key, value in first[0].items():
            assert torch.equal(state[key], value), key
        assert len(moments) == len(first[1])
        for a, b in zip(moments, first[1], strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)
    for key, value in weights(model).items():
        torch.testing.assert_close(first[0][key], value, rtol=tol, atol=tol)
    for p, found in zip(model.parameters(), first[1], strict=True):
        for key in ("step", "skipped"):
            assert int(optimizer.state[p][key]) == int(found[key])


@pytest.mark.parametrize(
    ("world", "distribute", "steps"),
    [(2, False, 80), (2, True, 80), pytest.param(4, False, 50, marks=pytest.mark.slow)]
    + [pytest.param(4, share, 200, marks=pytest.mark.slow) for share in (False, True)],
)
def test_replicas_agree_to_the_bit_and_with_one_process(tmp_path, world, distribute, steps):
    options = {"distribute": True} if distribute else {}
    launch(ddp_worker, world, tmp_path, "CondLR", options, steps, None)
    assert_ranks_agree_and_equal(tmp_path, world, *single(steps=steps), 1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("CondLRAdam", {}),
        ("CondLRAdam", {"distribute": True, "weight_decay": 0.1}),
        ("CondLRMuon", {"distribute": True, "weight_decay": 0.1}),
        ("CondLR", {"distribute": True, "nesterov": True, "penalty": 0.01}),
        ("CondLR", {"distribute": True, "clip_margin": 0.5}),
    ],
)
def test_other_options_do_so_too(tmp_path, kind, options):
    launch(ddp_worker, 2, tmp_path, kind, options, 20, None)
    alone = {key: value for key, value in options.items() if key != "distribute"}
    assert_ranks_agree_and_equal(tmp_path, 2, *single(kind, 20, **alone), 1e-6)


@pytest.mark.parametrize("distribute", [False, True])
@pytest.mark.parametrize("spoil", [0, 5])
def test_a_gradient_that_is_not_finite_is_skipped_by_all(tmp_path, distribute, spoil):
    options = {"distribute": True} if distribute else {}
    launch(ddp_worker, 2, tmp_path, "CondLR", options, 10, spoil)
    model, optimizer = single(steps=10, spoil=spoil)
    assert optimizer.skipped_steps == 1
    assert_ranks_agree_and_equal(tmp_path, 2, model, optimizer, 1e-6)


def switching_worker(rank, world, folder):
    model = network()
    optimizer = optimizer_for(model, distribute=True)
    for step in range(3):
        optimizer.param_groups[0]["momentum"] = 0.0 if step == 1 else 0.5
        if step == 2:  # the others have other owners without this one
            model[0].weight.requires_grad_(False)
        train(model, optimizer, 1, first=step)
        save(folder, f"{rank}-{step}", model, optimizer)


def test_momentum_that_was_switched_off_is_gone_on_all(tmp_path):
    launch(switching_worker, 2, tmp_path)
    for step, kept in ((0, True), (1, False), (2, True)):
        files = (tmp_path / f"rank-{rank}-{step}.pt" for rank in range(2))
        (one, state), (other, others) = (torch.load(f, weights_only=True) for f in files)
        assert all(torch.equal(value, other[key]) for key, value in one.items())
        for a, b in zip(state, others, strict=True):
            assert a.keys() == b.keys()
        assert ("momentum_buffer" in state[-1]) == kept


def failing_worker(rank, world, folder):
    """A step that overflows at the rank which owns the layer."""
    model = network()
    optimizer = optimizer_for(model, distribute=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weight = model[3].weight
    weight.grad.fill_(1e200)
    with pytest.raises(FloatingPointError, match="cannot be made") as caught:
        optimizer.step()
    whole = weights(model)
    torch.save([whole, str(caught.value)], folder / f"rank-{rank}.pt")


def test_a_step_that_fails_on_one_rank_raises_on_all_and_none_hangs(tmp_path):
    launch(failing_worker, 2, tmp_path)
    (one, words), (other, others) = results(tmp_path, 2)
    assert sum(text.startswith("on rank") for text in (words, others)) == 1
    start = weights(network())
    for key, value in one.items():
        assert torch.equal(value, other[key])
    assert torch.equal(one["3.weight"], start["3.weight"])


def geometry_worker(rank, world, folder):
    model = network()
    optimizer = optimizer_for(model, distribute=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        model[3].weight.add_(1.0)
    with pytest.raises(GeometryError, match="is not on its manifold"):
        optimizer.step()


def test_a_weight_off_its_manifold_is_named_on_all(tmp_path):
    launch(geometry_worker, 2, tmp_path)


def test_without_a_process_group_it_says_what_is_missing():
    model = network()
    optimizer = optimizer_for(model, distribute=True)
    model(torch.randn(1, 2, 4, 4, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match="distribute=True needs a process group"):
        optimizer.step()


@given(costs=st.lists(st.floats(0, 100), max_size=30), ranks=st.integers(1, 5))
def test_loads_are_nearly_equal(costs, ranks):
    owners = assign(costs, ranks)
    assert len(owners) == len(costs)
    loads = [0.0] * ranks
    for owner, cost in zip(owners, costs, strict=True):
        loads[owner] += cost
    assert max(loads) <= sum(costs) / ranks + max(costs, default=0.0) + 1e-9
