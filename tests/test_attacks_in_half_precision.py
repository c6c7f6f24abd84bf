"""Images in half precision: attacks are as strong as in float32, and inside the ball exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_nets import property_test
from torch import nn

from lrmanifold.experiments.adversarial import Adversarial, AdversarialLoss
from lrmanifold.precision import rounded_towards
from lrmanifold.robustness import accuracy_under_attack, check_masking, fgsm, pgd, worst_case

HALF = (torch.bfloat16, torch.float16)


@given(seed=st.integers(0, 10**6), power=st.integers(-16, 3))
@property_test
@pytest.mark.parametrize("dtype", HALF)
def test_rounding_towards_gives_the_nearest_number_that_is_no_further_away(dtype, seed, power):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, generator=generator).to(dtype).float()
    x[::7] = 0
    z = x + 2.0**power * torch.randn(500, generator=generator)
    z[1::7] = x[1::7]
    r = rounded_towards(z, x, dtype)
    assert torch.equal(r.to(dtype).float(), r)
    assert bool(((torch.minimum(x, z) <= r) & (r <= torch.maximum(x, z))).all())
    beyond = torch.nextafter(r.to(dtype), torch.where(z > x, 1e4, -1e4).to(dtype)).float()
    further = (z > x) & (beyond <= z) | (z < x) & (beyond >= z)
    assert not bool(further.any())


def test_wider_dtypes_are_not_rounded():
    z, x = torch.tensor([0.1]), torch.tensor([0.0])
    assert rounded_towards(z, x, torch.float32) is z


def linear(device):
    """Logits (w.x + b, 0) with images that it gets right."""
    generator = torch.Generator().manual_seed(0)
    w = (0.04 * torch.randn(768, generator=generator)).to(device)
    x = torch.rand(100, 3, 16, 16, generator=generator).to(device)

    def model(z):
        return torch.stack((z.flatten(1).float() @ w - w.sum() / 2, z.new_zeros(len(z)).float()), 1)

    return model, x, w


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("steps", [7, 20, 100])
@pytest.mark.parametrize("levels", [2, 8])
def test_more_steps_are_not_weaker_on_a_linear_model(dtype, steps, levels, device):
    """Steps shorter than the spacing of bfloat16 used to be rounded away: one step fools more."""
    model, x, _ = linear(device)
    x, eps = x.to(dtype), levels / 255
    y = model(x).argmax(1)
    one = accuracy_under_attack(model, (x, y), fgsm, [eps])[eps]  # exact on a linear model
    for attack in (
        lambda: accuracy_under_attack(model, (x, y), pgd, [eps], steps=steps)[eps],
        lambda: worst_case(model, (x, y), eps, attacks=["pgd"], steps=steps).accuracy,
    ):
        assert attack() <= one + 0.01


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 1 / 255), ("linf", 8 / 255), ("l2", 0.05)])
def test_what_is_found_lies_inside_the_ball_exactly(dtype, norm, eps, device):
    model, x, _ = linear(device)
    x = x.to(dtype)
    y = model(x).argmax(1)
    how = Adversarial(eps, norm, steps=5, ramp=0.0)
    loss = AdversarialLoss(how, 10)
    for z in (
        fgsm(model, x, y, eps, norm=norm),
        pgd(model, x, y, eps, norm=norm, steps=9, generator=torch.Generator()),
        pgd(model, x, y, eps, norm=norm, random_start=False),
        loss.attacked(model, x, y, eps, loss.start(x, 0)),
    ):
        assert z.dtype == dtype
        assert bool(((z >= 0) & (z <= 1)).all())
        change = (z.double() - x.double()).flatten(1)
        size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
        assert float(size.max()) <= eps * (1 + 1e-5)
        assert float(size.max()) >= 0.3 * eps


def threshold(t, device):
    def model(z):
        mean = z.flatten(1).float().mean(1)
        return torch.stack((t - mean, mean - t), 1)

    x = torch.full((4, 1, 5, 5), 0.5, device=device, dtype=torch.bfloat16)
    return model, x, torch.zeros(4, dtype=torch.int64, device=device)


def test_an_image_that_rounding_carries_out_of_the_ball_does_not_count(device):
    """0.5 + 1.5/255 = 0.5059 lies between 0.5039 and 0.5078; the second is outside of the ball."""
    eps = 1.5 / 255
    safe, x, y = threshold(0.507, device)
    assert worst_case(safe, (x, y), eps, steps=10, queries=50).accuracy == 1
    assert check_masking(safe, (x, y), eps, steps=10, queries=1000).climbed == 1
    fooled, x, y = threshold(0.503, device)
    assert worst_case(fooled, (x, y), eps, steps=10, queries=50).accuracy == 0


def test_two_classes_in_float16_may_meet_in_a_tie(device):
    """The factor of logits that are almost equal used to overflow, and the attack to end there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)).to(device)
    half = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)).to(device).half()
    half.load_state_dict(net.state_dict())
    x = torch.rand(500, 64, device=device).half()
    y = half(x).argmax(1)
    strengths = [0.01, 0.03, 0.05]
    found = accuracy_under_attack(half, (x, y), pgd, strengths)
    expected = accuracy_under_attack(net, (x.float(), y), pgd, strengths)
    for eps in strengths:
        assert abs(found[eps] - expected[eps]) <= 0.02
    assert worst_case(half, (x, y), 0.03, attacks=["pgd"]).accuracy <= expected[0.03] + 0.02


@pytest.mark.parametrize("scale", [2.0**-k for k in (8, 10, 12)])
def test_small_logits_in_float16_are_attacked_as_well(scale, device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)).to(device).half()
    x = torch.rand(300, 64, device=device).half()
    y = net(x).argmax(1)

    def small(z):
        return net(z) * scale

    expected = accuracy_under_attack(net, (x, y), pgd, [0.02])[0.02]
    assert abs(accuracy_under_attack(small, (x, y), pgd, [0.02])[0.02] - expected) <= 0.04


def test_what_bfloat16_rounds_in_a_training_step_does_not_stall(device):
    """1,000 steps of adversarial training's attack reach the border, as 7 do."""
    model, x, w = linear(device)
    x = x.bfloat16()
    y = model(x).argmax(1)
    gains = []
    for steps in (7, 1000):
        loss = AdversarialLoss(Adversarial(2 / 255, steps=steps, ramp=0.0), 10)
        z = loss.attacked(model, x, y, 2 / 255, torch.zeros_like(x))
        gains.append(float(((z - x).float().flatten(1) @ w.sign()).abs().mean()))
    assert gains[1] >= 0.95 * gains[0]
