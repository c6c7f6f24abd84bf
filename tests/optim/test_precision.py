"""Mixed precision, short dtypes and float64: the geometry is computed in at least float32."""

from __future__ import annotations

import copy

import pytest
import torch
from small_nets import drift, low_rank_layers
from torch import nn

import lrmanifold as lrm
from lrmanifold.optim import CondLR, CondLRAdam, CondLRMuon

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS = {
    "CondLR": lambda p: CondLR(p, lr=0.2, momentum=0.5),
    "CondLRAdam": lambda p: CondLRAdam(p, lr=1e-2),
    "CondLRMuon": lambda p: CondLRMuon(p, lr=2e-2),
}


def network(device="cpu", dtype=torch.float32, *, gradient="factors", tau=0.1) -> nn.Module:
    dense = nn.Sequential(
        nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 24), nn.Linear(24, 2)
    )
    return lrm.factorize(dense.to(device, dtype), rank=4, tau=tau, gradient=gradient, exclude="4")


def batch(device="cpu", dtype=torch.float32, size=32):
    x = torch.randn(size, 2, 6, 6)
    return x.to(device, dtype), (x.sum((1, 2, 3)) > 0).long().to(device)


def cond(model: nn.Module) -> float:
    return max(float(x.manifold.cond(x.weight.detach().double())) for x in low_rank_layers(model))


def loss_of(model, x, y):
    return nn.functional.cross_entropy(model(x).float(), y)


def everything(model, optimizer):
    """All that a step could write to."""
    state = optimizer.state_dict()["state"]
    return copy.deepcopy([{k: v.detach() for k, v in model.state_dict().items()}, state])


def assert_untouched(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
        return
    keys = one.keys() if isinstance(one, dict) else range(len(one))
    assert len(one) == len(other)
    for key in keys:
        assert_untouched(one[key], other[key])


# -- autocast


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize(
    ("low", "gradient"),
    [
        ("bf16", "factors"),
        ("bf16", "probe"),
        ("fp16", "factors"),
        pytest.param("fp16", "probe", marks=pytest.mark.slow),
    ],
)
def test_autocast_trains_and_keeps_the_weights_in_float32(device, low, gradient, optimizer):
    model = network(device, gradient=gradient)
    steps = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=low == "fp16")
    losses = []
    for _ in range(100):
        x, y = batch(device)
        steps.zero_grad()
        with torch.autocast(device.type, dtype=DTYPES[low]):
            assert low_rank_layers(model)[0](x).dtype == DTYPES[low]
            loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        scaler.step(steps)
        scaler.update()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert drift(model) <= 1e-5
    assert cond(model) <= 1.1 + 1e-5
    assert steps.skipped_steps == 0


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("clip", [False, True])
def test_a_step_that_overflows_leaves_everything_untouched(device, optimizer, clip):
    model = network(device)
    steps = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)

    def step():
        x, y = batch(device)
        steps.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16):
            loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(steps)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(steps)
        scaler.update()

    for _ in range(3):
        step()
    before = everything(model, steps)
    scaler.update(2.0**60)  # beyond float16, whatever the loss
    step()
    assert any(not p.grad.isfinite().all() for p in model.parameters())
    assert_untouched(before, everything(model, steps))
    assert scaler.get_scale() == 2.0**59
    scaler.update(2.0**8)
    step()
    assert not torch.equal(low_rank_layers(model)[0].weight, before[0]["0.weight"])
    assert drift(model) <= 1e-5


def test_a_scaled_step_is_the_plain_one(device):
    one = network(device, torch.float64)
    other = copy.deepcopy(one)
    plain, scaled = (CondLR(m.parameters(), lr=0.1, momentum=0.5) for m in (one, other))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    for _ in range(5):
        x, y = batch(device, torch.float64)
        for model, steps in ((one, plain), (other, scaled)):
            steps.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            if model is one:
                loss.backward()
                plain.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(scaled)
                scaler.update()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)  # powers of two are exact


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_step_taken_under_autocast_is_the_one_outside(device, optimizer):
    one = network(device)
    other = copy.deepcopy(one)
    inside, outside = (OPTIMIZERS[optimizer](m.parameters()) for m in (one, other))
    for _ in range(3):
        x, y = batch(device)
        for model, steps in ((one, inside), (other, outside)):
            steps.zero_grad()
            loss_of(model, x, y).backward()
        outside.step()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            inside.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


# -- parameters stored in other dtypes

LONG = [
    pytest.param("CondLR", "bf16", 0.1, id="CondLR-bf16"),
    pytest.param("CondLR", "bf16", None, marks=pytest.mark.slow, id="CondLR-bf16-no-bound"),
    pytest.param("CondLR", "fp16", 0.1, marks=pytest.mark.slow, id="CondLR-fp16"),
    pytest.param("CondLRAdam", "bf16", 0.1, marks=pytest.mark.slow, id="CondLRAdam-bf16"),
]


@pytest.mark.parametrize(("optimizer", "low", "tau"), LONG)
def test_drift_of_short_dtypes_is_that_of_storage_and_does_not_grow(optimizer, low, tau):
    model = lrm.factorize(
        nn.Sequential(nn.Flatten(), nn.Linear(72, 24), nn.ReLU(), nn.Linear(24, 2)),
        rank=4,
        tau=tau,
        exclude="3",
    ).to(DTYPES[low])
    steps = OPTIMIZERS[optimizer](model.parameters())
    if optimizer == "CondLR":
        steps.param_groups[0]["lr"] = 0.05  # batches are small here
    measured, losses = [], []
    for _ in range(1200):
        x, y = batch(dtype=DTYPES[low], size=8)
        steps.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        steps.step()
        if len(losses) % 5 == 0:
            measured.append(drift(model))
        losses.append(float(loss.detach()))
    assert {p.dtype for p in model.parameters()} == {DTYPES[low]}
    bound = {"bf16": 2e-2, "fp16": 3e-3}[low]
    assert max(measured) <= bound
    late, early = sum(measured[120:]) / 120, sum(measured[:120]) / 120
    assert late <= 1.1 * early  # a random walk would have grown by a factor of 1.7
    if tau is not None:
        assert cond(model) <= (1 + tau) * (1 + bound)
    assert sum(losses[-100:]) < 0.7 * sum(losses[:100])


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_float64_is_float64_all_the_way(device, optimizer):
    model = network(device, torch.float64)
    steps = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(100):
        x, y = batch(device, torch.float64)
        steps.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        steps.step()
    assert drift(model) <= 1e-13
    assert cond(model) <= 1.1 * (1 + 1e-12)
    for state in steps.state.values():
        tensors = [v for v in state.values() if v.is_floating_point()]
        assert {v.dtype for v in tensors} == {torch.float64}


@pytest.mark.parametrize("low", list(DTYPES))
def test_adam_keeps_second_moments_in_float32_and_goes_on_bit_for_bit(device, low):
    """In float16 they, and eps with them, would be 0: a division of 0 by 0."""
    torch.manual_seed(0)
    model = network(device, DTYPES[low])
    optimizer = CondLRAdam(model.parameters(), lr=1e-2)

    def train(net, rule, steps):
        losses = []
        for step in steps:
            torch.manual_seed(step)
            x, y = batch(device, DTYPES[low])
            rule.zero_grad()
            loss = loss_of(net, x, y)
            loss.backward()
            rule.step()
            losses.append(float(loss.detach()))
        return losses

    losses = train(model, optimizer, range(60))
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert optimizer.skipped_steps == 0
    assert drift(model) <= 2e-2
    assert {p.dtype for p in model.parameters()} == {DTYPES[low]}
    for state in optimizer.state.values():
        assert state["exp_avg"].dtype == DTYPES[low]
        assert state["exp_avg_sq"].dtype == torch.float32
    other = copy.deepcopy(model)
    resumed = CondLRAdam(other.parameters(), lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(60, 70))
    train(other, resumed, range(60, 70))
    assert_untouched(everything(model, optimizer), everything(other, resumed))
