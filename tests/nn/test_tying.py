"""Weights that layers share, and layers that are frozen, in a whole training run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lrmanifold as lrm


def tied_network() -> nn.Module:
    layers = [lrm.nn.LowRankLinear(8, 8, 3, dtype=torch.float64) for _ in range(2)]
    layers[1].weight = layers[0].weight
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def train(model, optimizer, steps=20):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 8, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()


OPTIMIZERS = {
    "CondLR": lambda p: lrm.optim.CondLR(p, lr=0.2, momentum=0.5),
    "CondLRAdam": lambda p: lrm.optim.CondLRAdam(p, lr=0.02),
    "CondLRMuon": lambda p: lrm.optim.CondLRMuon(p, lr=0.02),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_tied_weight_is_one_weight_that_is_moved_once_a_step(kind):
    model = tied_network()
    groups = lrm.optim.param_groups(model)
    assert sum(len(g["params"]) for g in groups) == 3
    optimizer = OPTIMIZERS[kind](groups)
    train(model, optimizer)
    assert model[0].weight is model[2].weight
    assert int(optimizer.state[model[0].weight]["step"]) == 20
    M, X = model[0].manifold, model[0].weight.detach()
    assert float(M.drift(X)) <= 1e-12
    assert float(M.cond(X)) <= 1.1 + 1e-12


def test_the_gradient_of_a_tied_weight_is_that_of_both_uses():
    model = tied_network()
    x = torch.randn(4, 8, dtype=torch.float64)
    model(x).sum().backward()
    first, second = (copy.deepcopy(model[i]) for i in (0, 2))
    untied = nn.Sequential(first, nn.Tanh(), second)
    untied.zero_grad()
    untied(x).sum().backward()
    total = first.weight.grad + second.weight.grad
    torch.testing.assert_close(model[0].weight.grad, total)


def test_tied_dense_weights_stay_tied_and_dense():
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "body": nn.Linear(8, 8)})
    model["head"] = nn.Linear(8, 20, bias=False)
    model["head"].weight = model["embed"].weight
    notes = []
    lrm.factorize(model, rank=2, summary=lambda plan: notes.extend(plan.decisions))
    assert type(model["head"]) is nn.Linear
    assert model["head"].weight is model["embed"].weight
    assert {d.name: d.reason for d in notes}["head"] == "its weight is tied to 'embed.weight'"
    assert isinstance(model["body"], lrm.nn.LowRankLinear)


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_frozen_layers_stay_to_the_bit_and_thaw(kind):
    dense = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    dense[0].requires_grad_(False)
    model = lrm.factorize(dense, rank=3)
    assert not model[0].weight.requires_grad
    optimizer = OPTIMIZERS[kind](model.parameters())
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[0].bias, before["0.bias"])
    assert not torch.equal(model[2].weight, before["2.weight"])
    model[0].requires_grad_(True)
    train(model, optimizer)
    assert not torch.equal(model[0].weight, before["0.weight"])
    for layer in (model[0], model[2]):
        assert float(layer.manifold.drift(layer.weight.detach())) <= 1e-12


def assigned(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def emptied(model):
    state = model.state_dict()
    model.to("meta").to_empty(device=state["0.weight"].device)
    model.load_state_dict(state)


def replaced(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


@pytest.mark.parametrize("how", [assigned, emptied, replaced])
def test_a_weight_that_is_tied_no_more_has_a_rank_of_its_own(how, device):
    """torch unties in these ways; the manifold, which holds the rank, must not stay shared."""
    model = tied_network().to(device)
    how(model)
    assert model[0].weight is not model[2].weight
    other = lrm.nn.LowRankLinear(8, 8, 1, dtype=torch.float64, device=device)
    model[0].load_state_dict(other.state_dict())
    assert (model[0].rank, model[2].rank) == (1, 3)
    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.1)
    x = torch.ones(2, 8, dtype=torch.float64, device=device)
    model(x).square().mean().backward()
    optimizer.step()
    model[0].load_state_dict(model[2].state_dict())
    model[2].weight = model[0].weight  # tied again
    model[0].load_state_dict(other.state_dict())
    assert (model[0].rank, model[2].rank) == (1, 1)


def test_a_swapped_weight_keeps_its_tie(device):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = tied_network().to(device).float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight is model[2].weight
    model[0].load_state_dict(lrm.nn.LowRankLinear(8, 8, 1).state_dict())
    assert (model[0].rank, model[2].rank) == (1, 1)


def tied_dense() -> nn.Module:
    layers = [nn.Linear(8, 8, dtype=torch.float64) for _ in range(2)]
    layers[1].weight = layers[0].weight
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def dlrt(params):
    return lrm.optim.DLRT(params, lr=0.2)


@pytest.mark.parametrize("build", [tied_network, tied_dense])
@pytest.mark.parametrize("kind", [*OPTIMIZERS.values(), dlrt], ids=[*OPTIMIZERS, "DLRT"])
def test_two_parameters_in_one_memory_are_refused_before_one_undoes_the_other(kind, build, device):
    """As assign=True leaves weights that were tied, in model and file: torch's SGD adds both."""
    model, source = build().to(device), build().to(device)
    model.load_state_dict(source.state_dict(), assign=True)
    assert model[0].weight is not model[2].weight
    x = torch.randn(16, 8, dtype=torch.float64, device=device)

    def loss():
        optimizer.zero_grad()
        value = (model(x) - x.flip(-1)).square().mean()
        value.backward()
        return value

    optimizer = kind(model.named_parameters())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'0\.weight' and '2\.weight' must not share"):
            optimizer.step(loss)
        assert torch.equal(model[0].weight, source[0].weight)
        assert torch.equal(model[0].bias, source[0].bias)
    model[2].weight.requires_grad_(False)  # one of them alone moves
    optimizer.step(loss)
    model[2].weight = model[0].weight
    optimizer = kind(model.named_parameters())
    optimizer.step(loss)
