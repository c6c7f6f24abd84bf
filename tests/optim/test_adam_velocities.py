"""Adam's step by velocities of the factors against the one by the manifold's own methods."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from test_adam import step_options
from test_velocities import SIZES, pull, taus, weight
from torch import Tensor

from lrmanifold.optim import CondLRAdam, adam_update


def plain_step(p, state, step, options) -> None:
    with torch.no_grad():
        Y, *moments = adam_update(p.manifold, p, p.grad, *state, step, **options)
        p.copy_(Y)
    state[:] = moments


@given(
    size=st.sampled_from(SIZES),
    tau=taus,
    gradient=st.sampled_from(["factors", "probe"]),
    edited=st.booleans(),
    data=st.data(),
    seed=seeds,
)
def test_steps_are_those_of_the_plain_formulas(size, tau, gradient, edited, data, seed):
    torch.manual_seed(seed)
    options = data.draw(step_options(tau))
    if tau is None:
        options["penalty_squared"] = True
    p = weight(*size, tau, gradient=gradient)
    q, target = copy.deepcopy(p), torch.randn(*size[:2], dtype=torch.float64)
    optimizer, state = CondLRAdam([p], **options), [None, None]
    for step in range(1, 6):
        for x in (p, q):
            x.grad = None
            pull(x, target).backward()
            if edited:  # as elementwise clipping does, after which no gauge identity holds
                x.grad.clamp_(-0.1, 0.1)
        optimizer.step()
        plain_step(q, state, float(step), options)
        if p.manifold.cond(q.detach()) > 1e4:
            return  # without a bound a core may become singular on the way
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-9, atol=1e-9)
        kept = optimizer.state[p]
        torch.testing.assert_close(kept["exp_avg"], state[0], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(kept["exp_avg_sq"], state[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_float32_stays_on_the_manifold_and_keeps_the_moment_tangent(tau):
    torch.manual_seed(0)
    p = weight(200, 90, 40, tau, dtype=torch.float32)
    H, A = torch.rand(200, 90), torch.randn(200, 90)
    optimizer = CondLRAdam([p], lr=1e-3)
    for _ in range(500):
        optimizer.zero_grad()
        W = p.manifold.to_dense(p) + 0.1 * torch.randn(200, 90)
        (H * (W - A).square()).sum().backward()
        optimizer.step()
    X = p.detach().double()
    assert float(p.manifold.drift(X)) <= 3e-6
    assert float(p.manifold.cond(X)) <= (1 + tau) * (1 + 1e-5)
    for Q, P in zip(
        p.manifold.unpack(X)[::2],
        p.manifold.unpack(optimizer.state[p]["exp_avg"].double())[::2],
        strict=True,
    ):
        assert float((Q.mT @ P).norm()) <= 1e-5 * float(P.norm())


def test_a_step_that_cannot_be_made_changes_nothing():
    torch.manual_seed(0)
    p = weight(9, 6, 3, 0.1)
    optimizer = CondLRAdam([p], lr=1e-3)
    pull(p, torch.ones(9, 6, dtype=torch.float64)).backward()
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state[p].items()}
    before = p.detach().clone()
    optimizer.param_groups[0]["penalty"] = 1e200
    with torch.no_grad():
        p.grad.fill_(1e200)
    with pytest.raises(FloatingPointError, match="cannot be made"):
        optimizer.step()
    assert torch.equal(p, before)
    for key, value in optimizer.state[p].items():
        assert torch.equal(value, state[key])


def test_equal_weights_do_not_share_their_moments():
    torch.manual_seed(0)
    pair = [weight(120, 100, 40, 0.1) for _ in range(2)]
    alone = copy.deepcopy(pair)
    together = CondLRAdam(pair, lr=1e-2)
    apart = [CondLRAdam([q], lr=1e-2) for q in alone]
    targets = torch.randn(2, 120, 100, dtype=torch.float64)
    for _ in range(3):
        for weights, optimizers in ((pair, [together]), (alone, apart)):
            for x, target in zip(weights, targets, strict=True):
                x.grad = None
                pull(x, target).backward()
            for optimizer in optimizers:
                optimizer.step()
    for p, q in zip(pair, alone, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("size", [1e19, 1e20])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_second_moments_that_overflow_are_never_kept(size, batch):
    """Kept, they would stop the weight for good."""
    torch.manual_seed(0)
    p = weight(9, 6, 3, 0.1, batch, dtype=torch.float32)
    optimizer = CondLRAdam([p], lr=1e-3)
    p.grad = size * torch.randn_like(p).as_subclass(Tensor)
    before = p.detach().clone()
    with pytest.raises(FloatingPointError, match="cannot be made"):
        optimizer.step()
    assert torch.equal(p, before)
    assert "exp_avg_sq" not in optimizer.state[p]
