"""What holds after every step of real training, and CondLR among torch's training tools."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankConv2d, LowRankLayer, LowRankLinear
from lrmanifold.optim import CondLR, param_groups


def mlp(rank: int, tau: float | None, **options) -> nn.Module:
    return nn.Sequential(
        LowRankLinear(12, 20, min(rank, 12), tau=tau, **options),
        nn.Tanh(),
        LowRankLinear(20, 16, rank, tau=tau, **options),
        nn.Tanh(),
        nn.Linear(16, 4, **options),
    )


def convnet(rank: int, tau: float | None, **options) -> nn.Module:
    return nn.Sequential(
        LowRankConv2d(3, 12, 3, min(rank, 12), padding=1, tau=tau, **options),
        nn.ReLU(),
        LowRankConv2d(12, 8, 3, min(rank, 4), groups=2, tau=tau, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(4, **options),
    )


def batch(shape: tuple[int, ...], device="cpu", dtype=torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape, device=device)
    y = (x.flatten(1)[:, :4] + 0.3 * x.flatten(1)[:, 4:8]).argmax(1)
    return x.to(dtype), y


def geometry(model: nn.Module) -> tuple[float, float]:
    """Largest excess of cond over its bound, as a factor, and largest drift of a model."""
    excess, drift = 0.0, 0.0
    for layer in model.modules():
        if isinstance(layer, LowRankLayer):
            X = layer.weight.detach()
            drift = max(drift, float(layer.manifold.drift(X.double()).max()))
            if layer.tau is not None:
                s = torch.linalg.svdvals(layer.manifold.unpack(X).S.double())
                excess = max(excess, float((s[..., 0] / s[..., -1]).max()) / (1.0 + layer.tau))
    return excess, drift


def train(model, optimizer, x, y, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


@settings(max_examples=12)
@given(
    build=st.sampled_from([mlp, convnet]),
    rank=st.sampled_from([1, 4, 16]),
    tau=st.sampled_from([0.0, 0.1, 0.5, 3.0]),
    lr=st.sampled_from([0.01, 0.1, 0.5]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    penalty=st.sampled_from([0.0, 0.01]),
    seed=seeds,
)
def test_every_step_in_float32_stays_well_conditioned_and_orthonormal(
    device, build, rank, tau, lr, momentum, penalty, seed
):
    torch.manual_seed(seed)
    model = build(rank, tau, device=device)
    x, y = batch((32, 12) if build is mlp else (16, 3, 6, 6), device)
    model(x)  # lazy layers take their shape
    optimizer = CondLR(
        model.parameters(), lr, momentum=momentum, weight_decay=1e-3, penalty=penalty
    )
    for _ in train(model, optimizer, x, y, 25):
        excess, drift = geometry(model)
        assert excess <= 1.0 + 1e-5
        assert drift <= 1e-5
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("tau", [None, 0.0, 0.5])
@pytest.mark.parametrize("build", [mlp, convnet])
def test_training_learns(device, build, tau):
    torch.manual_seed(0)
    model = build(4, tau, device=device)
    x, y = batch((64, 12) if build is mlp else (32, 3, 6, 6), device)
    model(x)
    optimizer = CondLR(param_groups(model), lr=0.1, momentum=0.9, nesterov=True)
    losses = list(train(model, optimizer, x, y, 150))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_weights_train_with_bounded_drift(device, dtype, bound):
    torch.manual_seed(0)
    model = mlp(4, 0.1, dtype=dtype, device=device)
    x, y = batch((64, 12), device, dtype)
    optimizer = CondLR(model.parameters(), lr=0.1, momentum=0.5)
    losses, drifts = [], []
    for loss in train(model, optimizer, x, y, 200):
        losses.append(loss)
        excess, drift = geometry(model)
        drifts.append(drift)
        # The core is stored rounded, which moves a singular value by a few roundings.
        assert excess <= 1.0 + bound
    assert max(drifts) <= bound
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())
    assert optimizer.skipped_steps == 0


def test_clipped_gradients_are_those_used(device):
    torch.manual_seed(0)
    layer = LowRankLinear(6, 5, 2, tau=None, device=device, dtype=torch.float64)
    x = 100.0 * torch.randn(8, 6, device=device, dtype=torch.float64)
    (layer(x).square().sum()).backward()
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    assert float(norm) > 1.0
    clipped = torch.cat([p.grad.flatten() for p in layer.parameters()])
    assert float(clipped.norm()) == pytest.approx(1.0, rel=1e-3)
    X, G = layer.weight.detach().clone(), layer.weight.grad.clone()
    CondLR(layer.parameters(), lr=0.1).step()
    expected = layer.manifold.retr(X, -0.1 * layer.manifold.egrad2rgrad(X, G))
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_step_lr_sets_the_rate_of_the_step():
    layer = LowRankLinear(6, 5, 2)
    optimizer = CondLR(layer.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            layer.weight.grad = torch.zeros_like(layer.weight)
            layer.bias.grad = torch.ones_like(layer.bias)
            before = layer.bias.detach().clone()
            optimizer.step()
            rates.append(float((before - layer.bias.detach()).mean()))
            scheduler.step()
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025], rel=1e-5)


def test_one_cycle_cycles_rate_and_momentum(device):
    torch.manual_seed(0)
    model = mlp(4, 0.1, device=device)
    x, y = batch((64, 12), device)
    optimizer = CondLR(param_groups(model), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=40)
    seen = []
    for _ in train(model, optimizer, x, y, 39):
        scheduler.step()
        seen.append(tuple(optimizer.param_groups[0][k] for k in ("lr", "momentum")))
        excess, drift = geometry(model)
        assert excess <= 1.0 + 1e-5
        assert drift <= 1e-5
    assert max(lr for lr, _ in seen) == pytest.approx(0.5, rel=1e-2)
    assert min(m for _, m in seen) == pytest.approx(0.85, rel=1e-2)


def test_momentum_switched_off_and_on_again_starts_afresh():
    """A buffer that was not transported is no tangent vector where the point has gone since."""
    torch.manual_seed(0)
    layer = LowRankLinear(6, 5, 2, dtype=torch.float64)
    optimizer = CondLR([layer.weight], lr=0.1, momentum=0.9)
    for momentum in (0.9, 0.0):
        optimizer.param_groups[0]["momentum"] = momentum
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()
    twin = copy.deepcopy(layer)
    optimizer.param_groups[0]["momentum"] = 0.9
    fresh = CondLR([twin.weight], lr=0.1, momentum=0.9)
    for _ in range(2):
        layer.weight.grad = torch.randn_like(layer.weight)
        twin.weight.grad = layer.weight.grad.clone()
        optimizer.step(), fresh.step()
    assert torch.equal(layer.weight, twin.weight)


def test_grad_scaler_unscales_and_skips(device):
    torch.manual_seed(0)
    layer = LowRankLinear(6, 5, 2, device=device)
    optimizer = CondLR(layer.parameters(), lr=0.1, momentum=0.5)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    x = torch.randn(8, 6, device=device)
    twin = LowRankLinear(6, 5, 2, device=device)
    twin.load_state_dict(layer.state_dict())
    plain = CondLR(twin.parameters(), lr=0.1, momentum=0.5)
    for _ in range(3):
        optimizer.zero_grad(), plain.zero_grad()
        scaler.scale(layer(x).square().mean()).backward()
        twin(x).square().mean().backward()
        scaler.step(optimizer), plain.step()
        scaler.update()
    torch.testing.assert_close(layer.weight.detach(), twin.weight.detach())
    before = layer.weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(layer(x).square().mean() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight.detach(), before)
    assert scaler.get_scale() == 2.0**9


def test_autocast_forward_trains_float32_weights(device):
    torch.manual_seed(0)
    model = mlp(4, 0.1, device=device)
    x, y = batch((64, 12), device)
    optimizer = CondLR(model.parameters(), lr=0.2, momentum=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = model(x)
        assert out.dtype == torch.bfloat16
        loss = nn.functional.cross_entropy(out.float(), y)
        loss.backward()
        optimizer.step()
        assert geometry(model)[0] <= 1.0 + 1e-5
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert float(loss.detach()) < 0.8


def test_an_overflowing_step_raises_and_writes_nothing():
    layer = LowRankLinear(6, 5, 2, tau=None)
    before = layer.weight.detach().clone()
    optimizer = CondLR(layer.named_parameters(), lr=1e30)
    layer.weight.grad = torch.zeros_like(layer.weight)
    layer.manifold.unpack(layer.weight.grad).S.fill_(1e30)
    with pytest.raises(FloatingPointError, match=r"'weight' cannot be made.*overflows"):
        optimizer.step()
    assert torch.equal(layer.weight.detach(), before)


def test_shared_layers_take_one_step():
    torch.manual_seed(0)
    layer = LowRankLinear(6, 6, 2, bias=False, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    groups = param_groups(model)
    assert [len(g["params"]) for g in groups] == [1]
    optimizer = CondLR(groups, lr=0.1)
    model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert int(optimizer.state[layer.weight]["step"]) == 1
    assert lrm.WellConditioned is type(layer.manifold)
