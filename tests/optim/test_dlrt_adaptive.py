"""Ranks that DLRT finds, the certificate on the way, and the penalty of RobustDLRT."""

from __future__ import annotations

import itertools

import geoopt
import pytest
import torch
from adaptive import Regression, assert_certified, target
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor

import lrmanifold as lrm
from lrmanifold.optim import DLRT, capped_dlrt, robust_dlrt


@given(size=st.sampled_from([(9, 8, 2), (7, 12, 3), (6, 5, 1)]), cond=st.booleans(), seed=seeds)
def test_the_augmented_step_never_raises_the_loss_before_truncation(size, cond, seed):
    torch.manual_seed(seed)
    M = lrm.FixedRank(*size)
    X = M.random(dtype=torch.float64).as_subclass(Tensor)
    if cond:  # tiny singular values must not matter
        M.unpack(X).S.copy_(torch.diag(10.0 ** -torch.arange(0, 4 * size[2], 4).double()))
    p, losses = geoopt.ManifoldParameter(X, manifold=M), []
    H, A = 0.2 + torch.rand(size[:2]).double(), torch.randn(size[:2]).double()
    # tol = 0 keeps all; a quadratic with curvature below 1.2, so S steps of 0.5 descend.
    optimizer = DLRT([p], 0.5, tol=0.0, s_steps=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (H * (M.to_dense(p) - A).square()).sum()
        loss.backward()
        return loss.detach()

    for _ in range(3):
        losses.append(float(optimizer.step(closure)))
    losses.append(float(closure()))
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("start", [2, 32])
@pytest.mark.parametrize("tau", [None, 0.5])
@pytest.mark.parametrize("lr", [0.1, 0.5])
def test_an_adaptive_run_finds_rank_8(start, tau, lr):
    problem = Regression(target(), start, tau=tau)
    parameters = problem.model.parameters()
    if tau is None:
        optimizer = robust_dlrt(parameters, lr, tol=0.01, beta=0.01)
    else:
        optimizer = capped_dlrt(parameters, lr, tol=0.01)
    for _ in range(60):
        optimizer.step(problem.closure)
        assert_certified(problem.model)
    assert problem.layer.rank == 8
    assert problem.error() < 1e-2  # noise 1e-3 / ‖A‖ = 4e-4, and the bias of the penalty


def test_a_bound_does_not_lift_directions_that_are_cheaper_to_drop():
    # A tolerance alone keeps 40 of 40 directions here: each is lifted into the band at every step.
    problem = Regression(target(), 32, tau=0.5)
    optimizer = capped_dlrt(problem.model.parameters(), 0.1, tol=0.01)
    losses = [float(optimizer.step(problem.closure)) for _ in range(30)]
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("tau", [0.0, 0.2])
def test_the_certificate_holds_at_every_step_while_the_target_and_the_rank_change(tau):
    targets = [target(24, 20, rank) for rank in (3, 9, 1, 6)]
    problem, found = Regression(targets[0], 5, tau=tau), []
    optimizer = capped_dlrt(problem.model.parameters(), 0.5, tol=0.05)
    for A in targets:
        problem.A = A
        for _ in range(40):
            optimizer.step(problem.closure)
            assert_certified(problem.model)
        found.append(problem.layer.rank)
    assert found == [3, 9, 1, 6]
    assert problem.error() < 1e-2


def test_minimum_and_maximum_rank_are_kept():
    for low, high, expected in ((1, 5, 5), (11, 11, 11), (10, None, 10)):
        problem = Regression(target(), 2, tau=None)
        options = {"tol": 0.01, "min_rank": low, "max_rank": high}
        optimizer = DLRT(problem.model.parameters(), 0.5, **options)
        for _ in range(15):
            optimizer.step(problem.closure)
        assert problem.layer.rank == expected


def test_a_rank_deficient_start_trains():
    problem = Regression(target(rank=3), 6, tau=None)
    with torch.no_grad():
        problem.layer.factors.S.zero_()
    optimizer = DLRT(problem.model.parameters(), 0.5, tol=0.01)
    for _ in range(20):
        optimizer.step(problem.closure)
    assert problem.layer.rank == 3
    assert problem.error() < 1e-2


def test_the_penalty_of_robust_dlrt_lowers_the_condition_number():
    conds, errors = [], []
    for beta in (0.0, 0.05, 0.5):
        problem = Regression(target(cond=8.0), 8, tau=None)
        optimizer = robust_dlrt(problem.model.parameters(), 0.3, tol=1e-3, beta=beta, s_steps=5)
        for _ in range(60):
            optimizer.step(problem.closure)
        s = problem.layer.manifold.svdvals(problem.layer.weight.detach())[:8]
        conds.append(float(s[0] / s[-1]))
        errors.append(problem.error())
    assert conds[0] == pytest.approx(8.0, rel=1e-2)
    assert conds[1] < 0.95 * conds[0]
    assert conds[2] < 0.7 * conds[1]
    assert errors[0] < errors[1] < errors[2]  # and it is no free lunch
