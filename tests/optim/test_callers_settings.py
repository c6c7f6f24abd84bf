"""Autocast, precision and gradients of the caller around closures and changes of rank."""

from __future__ import annotations

import pytest
import torch
from small_nets import drift
from torch import nn

import lrmanifold as lrm
from lrmanifold.adaptive import RankScheduler
from lrmanifold.optim import DLRT, CondLR


def network(tau: float | None, gradient: str = "factors") -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 12))
    return lrm.factorize(dense, rank=4, tau=tau, gradient=gradient, keep_larger=True)


def closure_of(model, optimizer):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(32, k, generator=generator) for k in (16, 12))

    def closure():
        optimizer.zero_grad()
        loss = (model(x).float() - y).square().mean()
        loss.backward()
        return loss

    return closure


def precision() -> str:
    known = torch.get_float32_matmul_precision()  # all that torch before 2.9 has
    return getattr(torch.backends.cuda.matmul, "fp32_precision", known)


@pytest.mark.parametrize("setting", ["medium", "high"])
def test_a_closure_has_the_precision_of_its_caller(setting):
    model = network(0.1)
    optimizer = DLRT(model.parameters(), lr=0.1)
    evaluate, seen = closure_of(model, optimizer), set()

    def closure():
        seen.add((precision(), torch.is_autocast_enabled("cpu")))
        return evaluate()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        theirs = precision()
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step(closure)
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {(theirs, True)}


@pytest.mark.parametrize(("tau", "gradient"), [(0.1, "factors"), (None, "probe")])
def test_ranks_adapt_in_full_precision_within_autocast(tau, gradient):
    model = network(tau, gradient)
    optimizer = CondLR(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = RankScheduler(model, optimizer, tol=0.05, every=2)
    closure = closure_of(model, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(6):
            closure()
            optimizer.step()
            scheduler.step(closure)
            assert drift(model) <= 1e-5
        scheduler.truncate()
    assert drift(model) <= 1e-5


def test_a_change_of_rank_leaves_no_gradients_to_other_parameters():
    """Where gradients are cleared after each step, the next ones would be added to them."""
    model = network(0.1)
    head = nn.Parameter(torch.ones(()))  # the closure uses it, its optimizer is another one
    optimizer = CondLR(list(model.parameters()), lr=0.1)
    model.register_parameter("head", head)
    scheduler = RankScheduler(model, optimizer, tol=0.05)
    evaluate = closure_of(model, optimizer)

    def closure():
        loss = evaluate()
        head.square().backward()
        return loss

    optimizer.zero_grad()
    scheduler.step(closure)
    assert all(p.grad is None for p in model.parameters())
    bias = model[0].bias
    bias.grad, kept = torch.full_like(bias, 3.0), torch.full_like(bias, 3.0)
    scheduler.step(closure)
    assert torch.equal(bias.grad, kept)
    assert head.grad is None


def test_layers_that_the_optimizer_does_not_hold_keep_their_rank():
    """To leave them out of it is a way to freeze them."""
    model = network(None, "probe")
    optimizer = CondLR(model[2].parameters(), lr=0.1)
    scheduler = RankScheduler(model, optimizer, tol=0.6)
    before = model[0].weight.detach().clone()
    closure_of(model, optimizer)()
    optimizer.step()
    scheduler.step()
    scheduler.truncate()
    assert torch.equal(model[0].weight, before)
    assert model[2].rank < 4
    optimizer.add_param_group({"params": model[0].parameters()})
    scheduler.truncate()
    assert model[0].rank < 4


def test_patterns_of_a_compiled_model_are_those_of_the_model_in_it():
    model = network(0.1)
    whole = torch.compile(model, backend="eager")
    optimizer = CondLR(model.parameters(), lr=0.1)
    scheduler = RankScheduler(whole, optimizer, tol=0.9, min_rank={"0": 3, "*": 2})
    scheduler.truncate()
    assert scheduler.ranks == {"0": 3, "2": 2}


@pytest.mark.parametrize("key", ["tol", "min_rank", "max_rank"])
def test_a_pattern_without_effect_is_refused(key):
    model = network(0.1)
    optimizer = CondLR(model.parameters(), lr=0.1)
    rules = {"tol": {"*": 0.1}, "min_rank": {"*": 2}, "max_rank": {"*": 4}}
    rules[key]["classifier"] = 0.5 if key == "tol" else 3
    with pytest.raises(ValueError, match=f"{key} pattern 'classifier' matches no layer; there"):
        RankScheduler(model, optimizer, **rules)
