"""State that no longer fits its parameter, and writes that keep a sum, are noticed."""

from __future__ import annotations

import copy

import pytest
import torch

import lrmanifold as lrm
from lrmanifold.optim import (
    DLRT,
    CondLR,
    CondLRAdam,
    CondLRMuon,
    OptionScheduler,
    RankScheduler,
    param_groups,
)


def net(rank):
    return torch.nn.Sequential(lrm.nn.LowRankLinear(12, 16, rank))


def step(model, optimizer):
    optimizer.zero_grad()
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", [lambda p: CondLR(p, lr=0.1, momentum=0.9), CondLRAdam])
@pytest.mark.parametrize("ranks", [(4, 2), (1, 3)])
def test_momentum_of_another_rank_is_refused(make, ranks):
    model = net(ranks[0])
    optimizer = make(model.parameters())
    step(model, optimizer)
    model.load_state_dict(net(ranks[1]).state_dict())
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="of another rank"):
        step(model, optimizer)
    ranks = RankScheduler(model, optimizer, tol=0.5, coefficient_steps=1)
    with pytest.raises(ValueError, match="of another rank"):
        ranks.step(lambda: model(torch.ones(2, 12)).sum().backward())
    with pytest.raises(ValueError, match="of another rank"):
        optimizer.momentum(model[0].weight)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="ranks must be those of the model"):
        ranks.load_state_dict({"count": 1, "ranks": 4})


def test_rows_that_change_places_behind_the_optimizers_back_are_noticed():
    torch.manual_seed(0)
    layer = lrm.nn.LowRankLinear(16, 16, 8)
    model = torch.nn.Sequential(layer)
    optimizer = CondLR(model.parameters(), lr=1e-4)
    x = torch.randn(5, 16)

    def go():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    go()
    good = layer.weight.detach().clone()
    for _ in range(10):
        layer.weight.data.copy_(good[torch.randperm(40)])
        with pytest.raises(lrm.GeometryError):
            go()
        layer.weight.data.copy_(good)
        go()
        good = layer.weight.detach().clone()


def test_without_momentum_parameters_without_entries_remember_none_either():
    whole, empty = (torch.nn.Parameter(torch.ones(k, 3)) for k in (2, 0))
    optimizer = CondLR([whole, empty], lr=0.1, momentum=0.9)
    for momentum, kept in ((0.9, True), (0.0, False), (0.9, True)):
        optimizer.param_groups[0]["momentum"] = momentum
        for p in (whole, empty):
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.state[whole].keys() == optimizer.state[empty].keys()
        assert ("momentum_buffer" in optimizer.state[whole]) == kept


def test_a_momentum_that_rests_is_kept_through_a_file():
    torch.manual_seed(0)
    models = [net(4), net(4)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (CondLR(x.parameters(), lr=0.1, momentum=0.9) for x in models)
    step(models[0], ours)
    ours.param_groups[0]["momentum"] = 0.0
    ours.zero_grad()
    ours.step()  # without gradients nothing moves, and nothing is forgotten
    models[1].load_state_dict(models[0].state_dict())
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for model, optimizer in zip(models, (ours, theirs), strict=True):
        optimizer.param_groups[0]["momentum"] = 0.9
        step(model, optimizer)
    for a, b in zip(*(x.parameters() for x in models), strict=True):
        assert torch.equal(a, b)


def test_a_scheduled_option_is_checked_and_later_groups_take_part():
    layer = lrm.nn.LowRankLinear(8, 8, 2)
    optimizer = CondLR([layer.weight], lr=0.1, penalty=0.1)
    with pytest.raises(ValueError, match="penalty"):
        OptionScheduler(optimizer, "penalty", lambda k: -1.0)
    assert optimizer.param_groups[0]["penalty"] == 0.1
    schedule = OptionScheduler(optimizer, "penalty", lambda k: 1.0 / (1 + k))
    optimizer.add_param_group({"params": [lrm.nn.LowRankLinear(8, 8, 2).weight], "penalty": 0.4})
    schedule.step()
    assert [g["penalty"] for g in optimizer.param_groups] == [0.05, 0.2]


def test_a_state_dict_with_groups_of_nothing_is_refused():
    optimizer = CondLR(net(2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="'params'"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{}]})


def test_adapters_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    x = torch.randn(8, 32)
    want = model(x).detach()
    lrm.nn.adapt(model, rank=4)
    groups = param_groups(model, weight_decay=0.1)
    assert [(g["name"], g["weight_decay"]) for g in groups] == [("adapter", 0.0)]
    optimizer = CondLRAdam(groups, lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) * 0).sum().backward()
        optimizer.step()
    torch.testing.assert_close(model(x), want, atol=1e-4, rtol=1e-4)


def named(model, order):
    params = dict(model.named_parameters())
    return [(name, params[name]) for name in order]


def test_the_same_names_in_another_order_are_refused():
    """Layers of equal shape would get each other's momentum."""
    model = torch.nn.Sequential(lrm.nn.LowRankLinear(12, 12, 3), lrm.nn.LowRankLinear(12, 12, 3))
    order = [name for name, _ in model.named_parameters()]
    optimizer = CondLR(named(model, order), lr=0.1, momentum=0.9)
    step(model, optimizer)
    other = CondLR(named(model, order[2:] + order[:2]), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"got '0\.weight' in the place of '1\.weight'"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_messages_name_parameters_as_they_are_here():
    """Not as they were called when they were saved, within a wrapper say."""
    model = net(3)
    pairs = list(model.named_parameters())
    saved = CondLR([(f"module.{name}", p) for name, p in pairs], lr=0.1)
    optimizer = CondLR(pairs, lr=0.1)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in pairs]


def test_options_that_a_file_does_not_have_stay_as_they_are_in_their_group():
    """A file of torch's optimizers, or of an earlier version."""
    dense = torch.nn.Linear(4, 3)
    sgd = torch.optim.SGD(dense.parameters(), lr=0.07, momentum=0.9)
    groups = [{"params": list(dense.parameters()), "clip_margin": 0.2, "skip_nonfinite": False}]
    optimizer = CondLR(groups, lr=0.1)
    optimizer.load_state_dict(sgd.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["clip_margin"], group["skip_nonfinite"]) == (0.07, 0.2, False)


def test_a_schedule_writes_into_a_rate_that_is_a_tensor():
    """As torch's schedulers do: a captured step reads the tensor that it was captured with."""
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = CondLR(net(3).parameters(), lr=rate)
    schedule = OptionScheduler(optimizer, "lr", lambda i: 0.5**i)
    schedule.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.025


@pytest.mark.parametrize(
    ("start", "dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float64, torch.float16),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda p: CondLR(p, lr=0.1, momentum=0.9), CondLRAdam, CondLRMuon]
)
def test_a_model_of_another_dtype_goes_on_as_from_a_file(make, start, dtype):
    model = net(3).append(torch.nn.Linear(16, 4)).to(start)
    optimizer = make(model.parameters())

    def train(model, optimizer):
        x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            optimizer.zero_grad()
            model(x.to(model[1].weight.dtype)).square().mean().backward()
            optimizer.step()

    train(model, optimizer)
    model.to(dtype)
    train(model, optimizer)
    other = copy.deepcopy(model)
    resumed = make(other.parameters())
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer)
    train(other, resumed)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_integrator_comes_with_the_state_and_is_one_for_all_groups():
    def groups():
        return [{"params": net(3).parameters()}, {"params": net(2).parameters()}]

    optimizer = DLRT(groups(), 0.1)
    optimizer.load_state_dict(DLRT(groups(), 0.1, integrator="ksl").state_dict())
    assert [g["integrator"] for g in optimizer.param_groups] == ["ksl", "ksl"]
    mixed = copy.deepcopy(optimizer.state_dict())
    mixed["param_groups"][1]["integrator"] = "bug"
    words = r"integrator must be the same for all groups.*\['bug', 'ksl'\]"
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(mixed)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": net(2).parameters(), "integrator": "bug"})
    assert [g["integrator"] for g in optimizer.param_groups] == ["ksl", "ksl"]


@pytest.mark.parametrize("make", [CondLR, CondLRAdam, CondLRMuon])
def test_a_capturable_rate_that_a_file_brings_to_the_host_goes_to_the_device(device, make):
    """A captured graph takes a tensor of the host for a constant."""
    there = torch.device("meta") if device.type == "cpu" else device
    model = lrm.nn.LowRankLinear(12, 16, 3, device=there)
    optimizer = make(model.parameters(), 0.1, capturable=True)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = torch.tensor(0.05)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"].device.type == there.type
    if there.type != "meta":
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
    late = make(model.parameters(), torch.tensor(0.1), capturable=True)
    assert late.param_groups[0]["lr"].device.type == there.type
