"""Steps with NaN or Inf in a gradient, on the CPU and on an accelerator that nobody waits for."""

from __future__ import annotations

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import ForbidHostSynchronisation
from strategies import seeds
from torch import Tensor

import lrmanifold as lrm
from lrmanifold.nn import LowRankLinear
from lrmanifold.optim import CondLR, CondLRAdam, CondLRMuon, force_accelerator

BAD = [float("nan"), float("inf"), float("-inf")]


def snapshot(optimizer: CondLR, p: Tensor) -> list[Tensor]:
    tensors = [p.detach(), *(v for k, v in optimizer.state[p].items() if k != "skipped")]
    return [t.clone() for t in tensors]


def fill_gradients(module: torch.nn.Module) -> None:
    for p in module.parameters():
        p.grad = torch.randn_like(p)


@given(
    bad=st.sampled_from(BAD),
    victim=st.sampled_from(["weight", "bias"]),
    place=st.integers(0, 10**6),
    momentum=st.sampled_from([0.0, 0.9]),
    warm=st.integers(0, 2),
    seed=seeds,
)
def test_bad_gradients_leave_parameter_and_momentum_bit_for_bit(
    device, bad, victim, place, momentum, warm, seed
):
    torch.manual_seed(seed)
    layer = LowRankLinear(6, 7, 3, device=device)
    optimizer = CondLR(layer.parameters(), lr=0.1, momentum=momentum, weight_decay=0.1)
    for _ in range(warm):
        fill_gradients(layer)
        optimizer.step()
    hit = getattr(layer, victim)
    other = layer.bias if victim == "weight" else layer.weight
    fill_gradients(layer)
    hit.grad.view(-1)[place % hit.numel()] = bad
    before, moving = snapshot(optimizer, hit), other.detach().clone()
    buffer = optimizer.state[hit].get("momentum_buffer")
    optimizer.step()
    if device.type == "cpu":
        after = snapshot(optimizer, hit)
        for x, y in zip(before, after, strict=False):  # the first step adds zero counters
            assert torch.equal(x, y)
    assert torch.equal(hit.detach(), before[0])
    if buffer is not None:
        assert optimizer.state[hit]["momentum_buffer"] is buffer
    assert not torch.equal(other.detach(), moving)
    assert int(optimizer.state[hit]["skipped"]) == 1
    assert int(optimizer.state[other]["skipped"]) == 0
    assert optimizer.skipped_steps == 1
    # The next good gradient moves it as if the bad one had never been.
    fill_gradients(layer)
    optimizer.step()
    assert not torch.equal(hit.detach(), before[0])
    assert torch.isfinite(hit).all()
    assert optimizer.skipped_steps == 1


def test_bad_first_gradient_leaves_no_trace_in_the_momentum(device):
    torch.manual_seed(0)
    layer, twin = (LowRankLinear(6, 7, 3, device=device) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    optimizers = [CondLR(x.parameters(), lr=0.1, momentum=0.9) for x in (layer, twin)]
    fill_gradients(layer)
    for p in layer.parameters():
        p.grad.fill_(float("nan"))
    optimizers[0].step()
    for _ in range(3):
        fill_gradients(layer)
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_without_skipping_the_cpu_raises_and_names_the_parameter():
    layer = LowRankLinear(6, 7, 3)
    optimizer = CondLR(layer.named_parameters(), lr=0.1, skip_nonfinite=False)
    fill_gradients(layer)
    layer.weight.grad[0, 0] = float("inf")
    before = layer.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="'weight' holds NaN or Inf"):
        optimizer.step()
    assert torch.equal(layer.weight.detach(), before)


# -- an accelerator: meta tensors have no values, see test_no_host_synchronisation.py


def parameters_without_values() -> list[Tensor]:
    low, conv = lrm.WellConditioned(8, 6, 3, tau=0.1), lrm.FixedRank(4, 6, 2, retraction="factored")
    shapes = ((low.point_shape, low), ((5, *conv.point_shape), conv))
    params: list[Tensor] = [
        geoopt.ManifoldParameter(torch.empty(*s, device="meta"), manifold=M) for s, M in shapes
    ]
    return [*params, torch.nn.Parameter(torch.empty(7, device="meta"))]


@pytest.mark.parametrize(("momentum", "skip_nonfinite"), [(0.9, True), (0.0, False)])
def test_steps_on_an_accelerator_do_not_wait_for_it(momentum, skip_nonfinite):
    params = parameters_without_values()
    optimizer = CondLR(
        params,
        lr=0.1,
        momentum=momentum,
        nesterov=momentum > 0,
        weight_decay=0.1,
        penalty=0.1,
        skip_nonfinite=skip_nonfinite,
    )
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    # Not even at the step at which the CPU would measure again.
    with ForbidHostSynchronisation():
        optimizer.step()
        for p in params:
            optimizer.state[p]["step"].fill_(100)
        optimizer.step()
    assert optimizer.state[params[0]]["step"].is_meta


def test_points_are_measured_once_and_after_every_counted_write(monkeypatch):
    """What tells that on an accelerator: version, storage and shape."""
    layer, calls = LowRankLinear(6, 7, 3), []
    check = type(layer.manifold).check_point_on_manifold
    counted = lambda self, *a, **k: calls.append(1) or check(self, *a, **k)  # noqa: E731
    optimizer = CondLR(layer.parameters(), lr=0.1, momentum=0.9)
    monkeypatch.setattr(type(layer.manifold), "check_point_on_manifold", counted)
    for write in (None, None, lambda p: p.mul_(1.0), lambda p: setattr(p, "data", p.data.clone())):
        fill_gradients(layer)
        if write is not None:
            with torch.no_grad():
                write(layer.weight)
        with force_accelerator():
            optimizer.step()
    assert len(calls) == 3


def test_a_step_that_overflows_on_an_accelerator_is_left_out(device):
    if device.type == "cpu":
        pytest.skip("raises there")
    layer = LowRankLinear(6, 5, 2, tau=None, device=device)
    before = layer.weight.detach().clone()
    optimizer = CondLR(layer.parameters(), lr=1e30, momentum=0.9)
    layer.weight.grad = torch.full_like(layer.weight, 1e30)
    optimizer.step()
    assert torch.equal(layer.weight.detach(), before)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("tau", [None, 0.1])
@pytest.mark.parametrize("lr", [0.1, 1e-30])
def test_adam_says_that_no_rate_helps_where_squares_of_gradients_overflow(tau, lr):
    layer = LowRankLinear(6, 7, 3, tau=tau)
    for p in layer.parameters():
        optimizer = CondLRAdam([p], lr=lr)
        p.grad = 1e20 * torch.randn_like(p)
        before = p.detach().clone()
        with pytest.raises(FloatingPointError, match="it overflows at every lr") as caught:
            optimizer.step()
        assert "Clip gradients first (torch.nn.utils.clip_grad_norm_)" in str(caught.value)
        assert "Lower lr" not in str(caught.value)
        assert torch.equal(p, before)


def test_a_step_that_overflows_at_this_rate_only_asks_for_a_lower_one():
    layer = LowRankLinear(6, 7, 3, tau=None, bias=False)
    optimizer = CondLR(layer.parameters(), lr=1e30)
    layer.weight.grad = 1e10 * torch.randn_like(layer.weight)
    with pytest.raises(FloatingPointError, match="Lower lr"):
        optimizer.step()


@pytest.mark.parametrize("kind", [CondLR, CondLRAdam, CondLRMuon])
def test_a_singular_core_is_told_from_a_long_step(kind):
    M = lrm.FixedRank(6, 5, 3, gradient="probe", retraction="factored")
    X = torch.Tensor(M.random())
    M.unpack(X).S.copy_(torch.diag(torch.tensor([1.0, 0.5, 0.0])))
    p = geoopt.ManifoldParameter(X, manifold=M)
    p.grad = 1e-3 * torch.randn_like(p)
    with pytest.raises(FloatingPointError, match="core S is singular") as caught:
        kind([p], lr=0.1).step()
    assert "a retraction that does not, such as 'svd'" in str(caught.value)
    assert "so long" not in str(caught.value)
