"""OptionScheduler, and the penalty that it is meant for."""

from __future__ import annotations

import dense_reference
import geoopt
import pytest
import torch
from hypothesis import given
from strategies import seeds, shapes
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankLinear
from lrmanifold.optim import CondLR, CondLRAdam, CondLRMuon, OptionScheduler

OPTIMIZERS = [
    pytest.param(lambda p, **o: CondLR(p, 0.1, **o), id="CondLR"),
    pytest.param(lambda p, **o: CondLRAdam(p, 0.1, **o), id="CondLRAdam"),
    pytest.param(lambda p, **o: CondLRMuon(p, 0.1, **o), id="CondLRMuon"),
]


def weight(M: lrm.FixedRank, S: Tensor | None = None) -> geoopt.ManifoldParameter:
    X = M.random(dtype=torch.float64).as_subclass(Tensor)
    if S is not None:
        M.unpack(X).S.copy_(S)
    return geoopt.ManifoldParameter(X, manifold=M)


# -- the schedule


def test_an_option_follows_its_function_in_every_group():
    layer = LowRankLinear(6, 5, 3, tau=None)
    groups = [{"params": [layer.weight], "penalty": 0.5}, {"params": [layer.bias], "penalty": 2.0}]
    optimizer = CondLR(groups, 0.1)
    scheduler = OptionScheduler(optimizer, "penalty", lambda step: min(1.0, step / 4))
    seen = [[group["penalty"] for group in optimizer.param_groups]]
    for _ in range(5):
        scheduler.step()
        seen.append([group["penalty"] for group in optimizer.param_groups])
    assert seen == [[0.0, 0.0], [0.125, 0.5], [0.25, 1.0], [0.375, 1.5], [0.5, 2.0], [0.5, 2.0]]


def test_the_schedule_continues_from_its_state():
    def parts() -> tuple[CondLR, OptionScheduler]:
        optimizer = CondLR(LowRankLinear(6, 5, 3).parameters(), 0.1, penalty=2.0)
        return optimizer, OptionScheduler(optimizer, "penalty", lambda step: 0.5**step)

    optimizer, scheduler = parts()
    for _ in range(3):
        scheduler.step()
    resumed, other = parts()
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    for x, s in ((optimizer, scheduler), (resumed, other)):
        assert x.param_groups[0]["penalty"] == 0.25
        s.step()
        assert x.param_groups[0]["penalty"] == 0.125


def test_a_schedule_built_after_a_resume_keeps_to_the_first_value_once_it_is_loaded():
    optimizer = CondLR(LowRankLinear(6, 5, 3).parameters(), 0.1, penalty=2.0)
    scheduler = OptionScheduler(optimizer, "penalty", lambda step: 0.5**step)
    scheduler.step()
    late = OptionScheduler(optimizer, "penalty", lambda step: 0.5**step)  # sees 1.0
    late.load_state_dict(scheduler.state_dict())
    assert optimizer.param_groups[0]["penalty"] == 1.0
    late.step()
    assert optimizer.param_groups[0]["penalty"] == 0.5


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "state must have count and initial"),
        ({"count": 3, "initial": [1.0, 2.0]}, "state must be of at most 1 groups"),
        ({"count": -1, "initial": [1.0]}, "count"),
        ({"count": 3, "initial": 1.0}, "initial of state must be a list"),
        ({"count": 3, "initial": [-1.0]}, "penalty"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(state, words):
    optimizer = CondLR(LowRankLinear(6, 5, 3).parameters(), 0.1, penalty=2.0)
    scheduler = OptionScheduler(optimizer, "penalty", lambda step: 0.5**step)
    scheduler.step()
    with pytest.raises(ValueError, match=words):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == {"count": 1, "initial": [2.0]}
    assert optimizer.param_groups[0]["penalty"] == 1.0


def test_schedules_of_rate_and_option_run_side_by_side():
    optimizer = CondLR(LowRankLinear(6, 5, 3).parameters(), 0.4, weight_decay=0.2)
    rate = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    decay = OptionScheduler(optimizer, "weight_decay", lambda step: 1.0 / (1 + step))
    for _ in range(2):
        optimizer.step()
        rate.step(), decay.step()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == pytest.approx((0.1, 0.2 / 3))


@pytest.mark.parametrize(
    ("option", "function", "words"),
    [
        ("betas", lambda step: 0.5, r"'betas' of each group must be a finite number"),
        ("params", lambda step: 1, r"'params' of each group must be a finite number"),
        ("maximize", lambda step: 1.0, r"'maximize' of each group must be a finite number"),
        ("weight_decay", lambda step: None, r"function\(0\) must be a finite number, got None"),
        ("weight_decay", lambda step: float("nan"), r"function\(0\) must be .* got nan"),
    ],
)
def test_options_and_factors_that_are_no_numbers_are_named(option, function, words):
    optimizer = CondLRAdam(LowRankLinear(6, 5, 3).parameters(), weight_decay=0.1)
    before = dict(optimizer.param_groups[0])
    with pytest.raises((TypeError, ValueError), match=words):
        OptionScheduler(optimizer, option, function)
    assert optimizer.param_groups[0] == before


def test_an_option_that_does_not_exist_is_refused_and_the_others_are_named():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    with pytest.raises(ValueError, match=r"momentum.*got 'penalty'"):
        OptionScheduler(optimizer, "penalty", lambda step: 1.0)


# -- the penalty


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_perfectly_conditioned_core_feels_no_penalty(make, squared):
    M = lrm.FixedRank(7, 6, 3, retraction="factored")
    torch.manual_seed(0)
    p = weight(M, 0.7 * torch.linalg.qr(torch.randn(3, 3).double()).Q)
    before = p.detach().clone()
    optimizer = make([p], penalty=5.0, penalty_squared=squared)
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("make", OPTIMIZERS)
@given(size=shapes, seed=seeds)
def test_the_penalty_moves_the_core_alone_by_its_own_gradient(make, squared, size, seed):
    torch.manual_seed(seed)
    M = lrm.FixedRank(*size, retraction="factored")
    p = weight(M)
    U, S, V = M.unpack(p.detach().clone())
    optimizer = make([p], penalty=0.01, penalty_squared=squared)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    slope = dense_reference.penalty_gradient(S, squared=squared)
    expected = U @ (S - 0.1 * 0.01 * slope) @ V.mT
    torch.testing.assert_close(M.to_dense(p.detach()), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_the_penalty_leaves_the_moments_alone(make):
    torch.manual_seed(0)
    defaults = make(iter([nn.Parameter(torch.ones(1))])).defaults
    options = {"momentum": 0.9} if "momentum" in defaults else {}
    M, gradient = lrm.FixedRank(7, 6, 3, retraction="factored"), torch.randn(16, 3).double()
    p = weight(M)
    q = geoopt.ManifoldParameter(p.detach().clone(), manifold=M)
    states = []
    for x, penalty in ((p, 0.0), (q, 1.0)):
        optimizer = make([x], penalty=penalty, **options)
        x.grad = gradient.clone()
        optimizer.step()
        name = "momentum_buffer" if options else "exp_avg"
        states.append(M.tangent_to_dense(x.detach(), optimizer.state[x][name]))
    # The same vector, transported to bases that the penalty does not turn.
    torch.testing.assert_close(*states, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_penalty_that_is_switched_on_later_lowers_the_condition_number(make):
    torch.manual_seed(0)
    # Against Adam's steps, of size 1 whatever the gradient, a penalty must be stronger.
    adam = "betas" in make([nn.Parameter(torch.ones(1))]).defaults
    M = lrm.FixedRank(9, 8, 4, retraction="factored")
    p = weight(M, torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]).double()))
    A = M.to_dense(p.detach()).clone()
    optimizer = make([p], penalty=1.5 if adam else 0.3)
    scheduler = OptionScheduler(optimizer, "penalty", lambda step: float(step >= 20))
    conds = []
    for _ in range(60):
        optimizer.zero_grad()
        (0.5 * (M.to_dense(p) - A).square().sum()).backward()
        optimizer.step()
        scheduler.step()
        conds.append(float(M.cond(p.detach())))
    assert conds[-1] < 7.0 < min(conds[:20])
