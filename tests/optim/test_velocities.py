"""The step in velocities against the formulas in tangent vectors; bundles; long runs."""

from __future__ import annotations

import copy

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor

import lrmanifold as lrm
from lrmanifold.optim import CondLR, condlr_update

SIZES = [(1, 1, 1), (9, 6, 3), (5, 11, 4), (7, 4, 4), (4, 7, 4), (5, 5, 5), (8, 8, 1)]
taus = st.sampled_from([None, 0.0, 0.1, 0.5])


def weight(m: int, n: int, rank: int, tau: float | None, lead=(), gradient="factors", **options):
    if tau is None:
        M = lrm.FixedRank(m, n, rank, retraction="factored", gradient=gradient)
    else:
        M = lrm.WellConditioned(m, n, rank, tau=tau, gradient=gradient)
    X = M.random(*lead, *M.point_shape, **{"dtype": torch.float64, **options})
    return geoopt.ManifoldParameter(X.as_subclass(Tensor), manifold=M)


def pull(p: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (p.manifold.to_dense(p) - target).square().sum()


@st.composite
def options(draw) -> dict:
    momentum = draw(st.sampled_from([0.0, 0.3, 0.9]))
    return {
        "lr": draw(st.sampled_from([0.0, 1e-3, 0.05, 0.3])),
        "momentum": momentum,
        "nesterov": momentum > 0 and draw(st.booleans()),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "penalty": draw(st.sampled_from([0.0, 0.03])),
        "penalty_squared": True,
        "metric": draw(st.sampled_from(["exact", "scalar"])),
    }


@given(
    size=st.sampled_from(SIZES),
    lead=st.sampled_from([(), (2,), (2, 3)]),
    tau=taus,
    gradient=st.sampled_from(["factors", "probe"]),
    options=options(),
    seed=seeds,
)
def test_steps_are_those_of_the_plain_formulas(device, size, lead, tau, gradient, options, seed):
    torch.manual_seed(seed)
    p = weight(*size, tau, lead, gradient, device=device)
    M, target = p.manifold, torch.randn(*lead, *size[:2], dtype=torch.float64, device=device)
    optimizer = CondLR([p], **options)
    X, b = p.detach().clone(), None
    for _ in range(4):
        optimizer.zero_grad()
        pull(p, target).backward()
        Y = X.clone().requires_grad_()
        (G,) = torch.autograd.grad(0.5 * (M.to_dense(Y) - target).square().sum(), Y)
        X, b = condlr_update(M, X, G, b, **options)
        optimizer.step()
    scale = float(M.to_dense(X).norm())
    gap = M.to_dense(p.detach()) - M.to_dense(X)
    if float(M.cond(X).max()) < 1e4:  # without a bound a core may nearly lose rank
        assert float(gap.norm()) <= 1e-10 * scale
        if b is not None:
            ours, plain = (M.tangent_to_dense(X, v) for v in (optimizer.momentum(p), b))
            assert float((ours - plain).norm()) <= 1e-8 * (1 + float(plain.norm()))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_a_step_keeps_gradient_and_earlier_momentum_as_they_were(decay, penalty):
    torch.manual_seed(0)
    p = weight(60, 200, 40, 0.1)
    optimizer = CondLR([p], lr=0.05, momentum=0.9, weight_decay=decay, penalty=penalty)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        grad, before = p.grad.clone(), optimizer.state[p].get("momentum_buffer")
        copied = None if before is None else before.clone()
        optimizer.step()
        after = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(p.grad, grad)
        assert after.shape == p.shape
        assert after.is_contiguous()
        assert after._base is None
        assert before is None or torch.equal(before, copied)


@given(seed=seeds, tau=st.sampled_from([0.0, 0.1]), momentum=st.sampled_from([0.0, 0.9]))
def test_a_gradient_edited_entry_by_entry_is_projected_in_full(seed, tau, momentum):
    torch.manual_seed(seed)
    p = weight(60, 200, 40, tau)
    M, X, b = p.manifold, p.detach().clone(), None
    optimizer = CondLR([p], lr=0.05, momentum=momentum)
    for _ in range(3):
        G = torch.randn_like(X)
        p.grad = G.clone()
        optimizer.step()
        X, b = condlr_update(
            M, X, G, b, lr=0.05, momentum=momentum, nesterov=False, weight_decay=0.0, penalty=0.0
        )
        assert float((p.detach() - X).norm()) <= 1e-10 * float(X.norm())


@given(size=st.sampled_from(SIZES), tau=taus, seed=seeds)
def test_the_scalar_metric_descends_vanishes_together_and_ignores_the_gauge(size, tau, seed):
    torch.manual_seed(seed)
    p = weight(*size, tau)
    M, target = p.manifold, torch.randn(*size[:2], dtype=torch.float64)
    pull(p, target).backward()
    before = float(pull(p, target).detach())
    gradient = M.egrad2rgrad(p.detach(), p.grad)
    CondLR([p], lr=1e-6, metric="scalar").step()
    slope = (before - float(pull(p, target).detach())) / 1e-6
    S = M.unpack(p.detach()).S
    s = torch.linalg.svdvals(S).square()
    mean = float(s.mean())
    norms = [float(x.square().sum()) for x in M.unpack(gradient)]
    tangent = norms[1] + float(s[-1]) / mean * (norms[0] + norms[2])
    if tau is None:  # no boundary that takes away from the descent
        assert slope >= 0.99 * tangent - 1e-4 * before - 1e-6


@given(seed=seeds, tau=st.sampled_from([0.0, 0.1, 0.5]), kind=st.sampled_from([0.0, 0.5, 0.9]))
def test_cores_stay_in_the_band_with_every_margin(seed, tau, kind):
    torch.manual_seed(seed)
    p = weight(20, 30, 8, tau, dtype=torch.float32)
    optimizer = CondLR([p], lr=0.1, momentum=0.9, clip_margin=kind)
    target = 3 * torch.randn(20, 30)
    for _ in range(30):
        optimizer.zero_grad()
        pull(p, target).backward()
        optimizer.step()
        assert float(p.manifold.cond(p.detach().double())) <= (1 + tau) * (1 + 1e-5)
        assert float(p.manifold.drift(p.detach())) <= 1e-5


# -- together


def twins(count: int, **options) -> tuple[list, list]:
    ours = [weight(12, 9, 3, 0.1, **options) for _ in range(count)]
    return ours, copy.deepcopy(ours)


@given(
    seed=seeds,
    options=options(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    margin=st.sampled_from([0.0, 0.5]),
)
def test_small_weights_move_together_as_they_do_alone(seed, options, dtype, margin):
    torch.manual_seed(seed)
    ours, theirs = twins(4, dtype=dtype)
    targets = torch.randn(4, 12, 9, dtype=dtype)
    together = CondLR(ours, clip_margin=margin, **options)
    alone = [CondLR([p], clip_margin=margin, **options) for p in theirs]
    for _ in range(4):
        for params in (ours, theirs):
            for p, target in zip(params, targets, strict=True):
                p.grad = None
                pull(p, target).backward()
        together.step()
        for optimizer in alone:
            optimizer.step()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for p, q, optimizer in zip(ours, theirs, alone, strict=True):
        a, b = together.momentum(p), optimizer.momentum(q)
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)
        assert int(together.state[p]["step"]) == 4


def test_one_bad_gradient_of_a_bundle_stops_only_its_weight():
    torch.manual_seed(0)
    ours, _ = twins(3)
    optimizer = CondLR(ours, lr=0.1, momentum=0.9)
    for p in ours:
        p.grad = torch.randn_like(p)
    ours[1].grad[0, 0] = float("nan")
    before = [p.detach().clone() for p in ours]
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(before, ours, strict=True)] == [False, True, False]
    assert [int(optimizer.state[p]["skipped"]) for p in ours] == [0, 1, 0]
    assert "momentum_buffer" not in optimizer.state[ours[1]]


def test_a_step_that_cannot_be_made_is_named_and_nothing_of_its_weight_is_written():
    torch.manual_seed(0)
    ours, _ = twins(3)
    optimizer = CondLR([(f"layer{i}", p) for i, p in enumerate(ours)], lr=0.1)
    for p in ours:
        p.grad = torch.randn_like(p)
    ours[2].grad.fill_(1.5e308)
    before = ours[2].detach().clone()
    with pytest.raises(FloatingPointError, match="layer2"):
        optimizer.step()
    assert torch.equal(ours[2].detach(), before)


# -- long runs


@pytest.mark.parametrize("steps", [250, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("metric", ["exact", "scalar"])
def test_many_steps_of_fast_and_plain_agree_in_loss(metric, steps):
    torch.manual_seed(0)
    p = weight(24, 16, 5, 0.1, dtype=torch.float32)
    M, X, b = p.manifold, p.detach().clone(), None
    x = torch.randn(256, 16)
    y = x @ (torch.randn(24, 16) / 4).mT
    plain = {"lr": 0.02, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "penalty": 0.0}

    def loss(W: Tensor, batch: Tensor) -> Tensor:
        return (x[batch] @ W.mT - y[batch]).square().mean()

    optimizer = CondLR([p], metric=metric, **plain)
    for _ in range(steps):
        batch = torch.randint(0, 256, (32,))
        optimizer.zero_grad()
        loss(M.to_dense(p), batch).backward()
        Y = X.clone().requires_grad_()
        (G,) = torch.autograd.grad(loss(M.to_dense(Y), batch), Y)
        X, b = condlr_update(M, X, G, b, metric=metric, **plain)
        optimizer.step()
    everything = torch.arange(256)
    with torch.no_grad():
        ours, theirs = (float(loss(M.to_dense(Z), everything)) for Z in (p, X))
    assert abs(ours - theirs) <= 1e-3 * theirs
    assert float(M.drift(p.detach())) <= 1e-6
