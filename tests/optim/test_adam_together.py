"""Many small weights of one shape, moved by CondLRAdam as one batch."""

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
from lrmanifold.optim import CondLRAdam


def weights(count: int, *, tau: float | None = 0.1, dtype=torch.float64, device="cpu") -> list:
    if tau is None:
        M = lrm.FixedRank(12, 9, 3, retraction="factored")
    else:
        M = lrm.WellConditioned(12, 9, 3, tau=tau)
    points = (M.random(*M.point_shape, dtype=dtype, device=device) for _ in range(count))
    return [geoopt.ManifoldParameter(X.as_subclass(Tensor), manifold=M) for X in points]


def pull(params: list, targets: Tensor, left_out: int | None = None) -> None:
    for i, (p, target) in enumerate(zip(params, targets, strict=True)):
        p.grad = None
        if i != left_out:
            (0.5 * (p.manifold.to_dense(p) - target).square().sum()).backward()


def together(params: list, **options) -> tuple[CondLRAdam, list[int]]:
    """An optimizer, and a list of the sizes of the batches that it moves."""
    optimizer, sizes = CondLRAdam(params, **options), []
    engine = optimizer._engine
    apply = engine._apply

    def counted(M, items, **options):
        sizes.append(len(items))
        return apply(M, items, **options)

    engine._apply = counted
    return optimizer, sizes


@given(
    tau=st.sampled_from([None, 0.0, 0.1, 0.5]),
    lr=st.sampled_from([0.0, 1e-3, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.99), (0.5, 0.0)]),
    decay=st.sampled_from([0.0, 0.1]),
    penalty=st.sampled_from([0.0, 0.03]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds,
)
def test_small_weights_move_together_as_they_do_alone(
    device, tau, lr, betas, decay, penalty, dtype, seed
):
    torch.manual_seed(seed)
    ours = weights(4, tau=tau, dtype=dtype, device=device)
    theirs = copy.deepcopy(ours)
    options = {"lr": lr, "betas": betas, "weight_decay": decay, "penalty": penalty}
    options["penalty_squared"] = True
    optimizer, sizes = together(ours, **options)
    alone = [CondLRAdam([q], **options) for q in theirs]
    targets = torch.randn(4, 12, 9, dtype=dtype, device=device)
    for k in range(5):
        # One weight makes a step less: its corrections of the bias are its own.
        left_out = 2 if k == 1 else None
        pull(ours, targets, left_out)
        pull(theirs, targets, left_out)
        optimizer.step()
        for one in alone:
            one.step()
    assert sizes == [4, 3, 4, 4, 4]
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for i, (p, q, one) in enumerate(zip(ours, theirs, alone, strict=True)):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)
        for key in ("exp_avg", "exp_avg_sq"):
            a, b = optimizer.state[p][key], one.state[q][key]
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert int(optimizer.state[p]["step"]) == (4 if i == 2 else 5)


def test_a_bad_gradient_stops_only_its_weight(device):
    torch.manual_seed(0)
    ours = weights(3, device=device)
    optimizer = CondLRAdam(ours, lr=0.01)
    targets = torch.randn(3, 12, 9, dtype=torch.float64, device=device)
    pull(ours, targets)
    optimizer.step()
    pull(ours, targets)
    ours[1].grad[0, 0] = float("nan")
    before = [p.detach().clone() for p in ours]
    moments = optimizer.state[ours[1]]["exp_avg"].clone()
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(before, ours, strict=True)] == [False, True, False]
    assert torch.equal(optimizer.state[ours[1]]["exp_avg"], moments)
    assert [int(optimizer.state[p]["skipped"]) for p in ours] == [0, 1, 0]
    assert [int(optimizer.state[p]["step"]) for p in ours] == [2, 1, 2]


def test_a_step_that_cannot_be_made_is_named_and_nothing_of_its_weight_is_written():
    torch.manual_seed(0)
    ours = weights(3)
    optimizer = CondLRAdam([(f"layer{i}", p) for i, p in enumerate(ours)], lr=0.1)
    for p in ours:
        p.grad = torch.randn_like(p)
    ours[2].grad.fill_(1.5e308)
    before = ours[2].detach().clone()
    with pytest.raises(FloatingPointError, match="layer2"):
        optimizer.step()
    assert torch.equal(ours[2].detach(), before)


def test_a_saved_state_goes_on_bit_for_bit():
    torch.manual_seed(0)
    ours = weights(3)
    targets = torch.randn(3, 12, 9, dtype=torch.float64)
    optimizer = CondLRAdam(ours, lr=0.01)
    for _ in range(3):
        pull(ours, targets)
        optimizer.step()
    theirs = copy.deepcopy(ours)
    resumed = CondLRAdam(theirs, lr=0.01)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for params, one in ((ours, optimizer), (theirs, resumed)):
        for _ in range(3):
            pull(params, targets)
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_corrections_of_the_bias_keep_their_digits_in_float32():
    torch.manual_seed(0)
    (p,) = weights(1, dtype=torch.float32)
    M, X = p.manifold, p.detach()
    G = torch.randn_like(X)
    options = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0, "penalty": 0.0}
    exact, *_ = lrm.optim.adam_update(M, X, G, None, None, 1.0, **options)
    found, *_ = lrm.optim.adam_update(M, X, G, None, None, torch.ones(1), **options)
    # 1 - 0.999 in float32 is off by 3e-5.
    assert float((found - exact).norm() / exact.norm()) <= 2e-6
