"""Averages, monitor and checkpoints of compiled and DDP models are those of the model itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import lrmanifold as lrm
from lrmanifold import checkpoint
from lrmanifold.optim import retracting_average


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs a process group of its own")
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def partly_compiled(model: nn.Module) -> nn.Module:
    model[0] = compiled(model[0])
    return model


WRAPPERS = {
    "compiled": compiled,
    "DDP": DistributedDataParallel,
    "DataParallel": DataParallel,
    "DDP of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "compiled DDP": lambda model: compiled(DistributedDataParallel(model)),
    "a compiled layer": partly_compiled,
}


@pytest.fixture(params=WRAPPERS)
def wrap(request, group):
    return WRAPPERS[request.param]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(12, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)
    return lrm.factorize(nn.Sequential(*layers), rank=2, exclude="3")


def train(model, average_of, *averages) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1, momentum=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 12, generator=generator)).square().mean().backward()
        optimizer.step()
        for average in averages:
            average.update_parameters(average_of)


def plain_names(state: dict) -> list[str]:
    return [key.replace("_orig_mod.", "") for key in state]


@pytest.mark.parametrize("made_from", ["the model", "the wrapped model"])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_the_average_is_that_of_the_model_itself(wrap, made_from, use_buffers):
    plain, inside = network(), network()
    expected = retracting_average(plain, 0.9, use_buffers=use_buffers)
    train(plain, plain, expected)
    average = retracting_average(copy.deepcopy(inside), 0.9, use_buffers=use_buffers)
    wrapped = wrap(inside)
    if made_from == "the wrapped model":
        average = retracting_average(wrapped, 0.9, use_buffers=use_buffers)
    train(wrapped, wrapped, average)
    found = average.module.state_dict()
    assert plain_names(found) == list(expected.module.state_dict())
    for value, other in zip(found.values(), expected.module.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6)  # older compilers round
    layer = next(m for m in average.modules() if isinstance(m, lrm.nn.LowRankLayer))
    assert float(layer.manifold.drift(layer.weight.detach()).max()) < 1e-5


def test_the_monitor_has_the_numbers_and_names_of_the_model_itself(wrap):
    plain, wrapped = network(), wrap(network())
    train(plain, plain)
    train(wrapped, wrapped)
    expected = lrm.monitor(plain, every=1).step()
    # compilers may round differently
    assert lrm.monitor(wrapped, every=1).step() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert "cond/0" in expected


def test_checkpoints_do_not_know_the_wrapper(wrap, tmp_path):
    inside = network()
    state = {k: v.clone() for k, v in inside.state_dict().items()}
    wrapped, other = wrap(inside), network()
    with torch.no_grad():
        other[3].bias.fill_(7)
    checkpoint.save(tmp_path / "a.pt", wrapped)
    if "_orig_mod" not in str(list(inside.state_dict())):  # a layer inside keeps its own names
        checkpoint.load(tmp_path / "a.pt", other)
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
        checkpoint.save(tmp_path / "b.pt", network())
        checkpoint.load(tmp_path / "b.pt", wrapped)
        torch.save(wrapped.state_dict(), tmp_path / "torch.pt")  # with the prefixes
        checkpoint.load(tmp_path / "torch.pt", network())


def test_the_trained_state_does_not_know_the_wrapper(wrap):
    def adapted() -> nn.Module:
        torch.manual_seed(0)
        return lrm.nn.adapt(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3)), 2, include="1")

    inside = adapted()
    change = inside[1].changes["default"]
    with torch.no_grad():
        change.update.weight.copy_(change.update.manifold.random(*change.update.weight.shape))
    state = lrm.nn.trained_state_dict(wrap(inside))
    other, x = adapted(), torch.randn(4, 12)
    assert not other.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(other(x), inside(x))


@pytest.mark.parametrize("wrapper", [None, "compiled", "DDP"])
@pytest.mark.parametrize("whole", [False, True])
def test_torchs_distributed_checkpoints_hold_adapters(wrapper, whole, group, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    def adapted(alpha) -> tuple[nn.Module, nn.Module]:
        model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3))
        lrm.nn.adapt(model, 2, include="1", alpha=alpha)
        return model, model if wrapper is None else WRAPPERS[wrapper](model)

    options = StateDictOptions(full_state_dict=whole)
    inside, model = adapted(6.0)
    change = inside[1].changes["default"]
    with torch.no_grad():
        change.update.weight.copy_(change.update.manifold.random(*change.update.weight.shape))
    state = get_model_state_dict(model, options=options)
    assert set(state) == set(inside.state_dict())
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    other, again = adapted(None)
    state = get_model_state_dict(again, options=options)
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    set_model_state_dict(again, state, options=options)
    x = torch.randn(4, 12)
    assert other[1].changes["default"].change_scale == 3.0
    assert torch.equal(other(x), inside(x))


def test_ddp_refuses_an_adapter_of_another_rank_whole(group):
    def adapted(rank) -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3))
        return lrm.nn.adapt(model, rank, include="1")

    state = {f"module.{k}": v for k, v in adapted(2).state_dict().items()}
    model = adapted(3)
    wrapped = DistributedDataParallel(model)
    change = model[1].changes["default"]
    start = change.start.clone()
    with pytest.raises(RuntimeError, match="change ranks on the bare model"):
        wrapped.load_state_dict(state)
    assert torch.equal(change.start, start)
    assert change.rank == 3
