"""Images in half precision: every attack is about as strong as on the same images in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lrmanifold.experiments.adversarial import Adversarial, AdversarialLoss
from lrmanifold.robustness import accuracy_under_attack, check_masking, fgsm, pgd, worst_case

HALF = (torch.bfloat16, torch.float16)


def linear(device):
    """Logits (w.x + b, 0) with images that it gets right."""
    generator = torch.Generator().manual_seed(0)
    w = (0.04 * torch.randn(768, generator=generator)).to(device)
    x = torch.rand(100, 3, 16, 16, generator=generator).to(device)

    def model(z):
        return torch.stack((z.flatten(1).float() @ w - w.sum() / 2, z.new_zeros(len(z)).float()), 1)

    return model, x, w


def perceptron(device, classes=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes)).to(
        device
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("steps", [7, 20, 100])
@pytest.mark.parametrize(("norm", "levels"), [("linf", 2), ("linf", 8), ("l2", 25)])
def test_more_steps_are_not_weaker_on_a_linear_model(dtype, steps, norm, levels, device):
    """Steps shorter than the spacing of bfloat16 used to be rounded away: one step fooled more."""
    model, x, _ = linear(device)
    x, eps = x.to(dtype), levels / 255
    y = model(x).argmax(1)
    expected = accuracy_under_attack(model, (x.float(), y), fgsm, [eps], norm=norm)[eps]
    assert 0 <= expected < 0.9
    for attack in (
        lambda: accuracy_under_attack(model, (x, y), pgd, [eps], steps=steps, norm=norm)[eps],
        lambda: worst_case(model, (x, y), eps, attacks=["pgd"], steps=steps, norm=norm).accuracy,
    ):
        assert attack() <= expected + 0.03


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.15)])
@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-t", "fab-t", "square"])
def test_each_attack_is_as_strong_as_on_the_same_images_in_float32(name, norm, eps, dtype, device):
    pytest.importorskip("pyautoattack")
    net = perceptron(device)
    x = torch.rand(100, 1, 8, 8, device=device).to(dtype)
    y = net(x.float()).argmax(1)
    options = {"attacks": [name], "norm": norm, "steps": 20, "queries": 200}
    expected = worst_case(net, (x.float(), y), eps, **options).accuracy
    found = worst_case(lambda z: net(z.float()), (x, y), eps, **options).accuracy
    assert expected < 0.95
    assert abs(found - expected) <= 0.04


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**7])
@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "apgd-t", "square"])
def test_logits_of_any_scale_in_float16_are_attacked(name, scale, device):
    """Their factor does not fit into float16 either. FAB ends where small logits are equal."""
    pytest.importorskip("pyautoattack")
    net = perceptron(device).half()
    x = torch.rand(100, 1, 8, 8, device=device).half()
    y = net(x).argmax(1)
    options = {"attacks": [name], "steps": 20, "queries": 200}
    expected = worst_case(net, (x, y), 0.03, **options).accuracy
    found = worst_case(lambda z: net(z) * scale, (x, y), 0.03, **options).accuracy
    assert expected < 0.95
    # the smallest logits have fewer bits
    assert abs(found - expected) <= 0.12


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("norm", "eps"), [("linf", 1 / 255), ("linf", 8 / 255), ("l2", 0.05)])
def test_what_is_found_lies_within_half_a_spacing_of_the_ball(dtype, norm, eps, device):
    model, x, _ = linear(device)
    x = x.to(dtype)
    y = model(x).argmax(1)
    loss = AdversarialLoss(Adversarial(eps, norm, steps=5, ramp=0.0), 10)
    spacing = torch.finfo(dtype).eps / 2  # of numbers in [0.5, 1]
    for z in (
        fgsm(model, x, y, eps, norm=norm),
        pgd(model, x, y, eps, norm=norm, steps=9, generator=torch.Generator()),
        pgd(model, x, y, eps, norm=norm, random_start=False),
        loss.attacked(Function(model), x, y, eps, loss.start(x, 0)),
    ):
        assert z.dtype == dtype
        assert bool(((z >= 0) & (z <= 1)).all())
        change = (z.double() - x.double()).flatten(1)
        size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
        room = spacing / 2 * (1 if norm == "linf" else change.shape[1] ** 0.5)
        assert float(size.max()) <= eps + 1.01 * room


class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


@pytest.mark.parametrize("factor", [1, 64])
def test_two_classes_in_float16_may_meet_in_a_tie(factor, device):
    """The gradient of logits that are almost equal overflows, and that is no reason to stop."""
    net, half = perceptron(device, 2), perceptron(device, 2).half()
    half.load_state_dict(net.state_dict())
    x = torch.rand(500, 64, device=device).half()
    y = half(x).argmax(1)
    strengths = [0.01, 0.03, 0.05]
    found = accuracy_under_attack(lambda z: half(z) * factor, (x, y), pgd, strengths)
    expected = accuracy_under_attack(net, (x.float(), y), pgd, strengths)
    for eps in strengths:
        assert abs(found[eps] - expected[eps]) <= 0.02
    worst = worst_case(lambda z: half(z) * factor, (x, y), 0.03, attacks=["pgd"]).accuracy
    assert worst <= expected[0.03] + 0.02


@pytest.mark.parametrize("measure", [worst_case, check_masking])
def test_images_that_miss_the_range_by_a_rounding_are_attacked(measure, device):
    """pgd and fgsm take them, and so does what calls pgd."""
    pytest.importorskip("pyautoattack")
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 4)).to(device, torch.bfloat16)
    x = torch.rand(4, 1, 5, 5, device=device).bfloat16()
    x[0, 0, 0, 0] = 1 + torch.finfo(torch.bfloat16).eps
    y = model(x.clamp(0, 1)).argmax(1)
    budget = {"steps": 2, "queries": 1000}
    whole, inside = (measure(model, (z, y), 0.02, **budget) for z in (x, x.clamp(0, 1)))
    assert whole == inside


def test_a_search_without_gradients_finds_what_only_it_can(device):
    """Gradient 0 everywhere; a dark corner fools, and nothing else."""
    pytest.importorskip("pyautoattack")

    def model(z):
        corner = z[..., :2, :2].flatten(1).float()
        gap = (0.4965 - corner.amax(1)).sign().detach() + 0 * corner.sum(1)
        return torch.stack((0 * gap, gap), 1)

    x = torch.full((8, 1, 5, 5), 0.5, device=device, dtype=torch.bfloat16)
    y = torch.zeros(8, dtype=torch.int64, device=device)
    found = check_masking(model, (x, y), 1.5 / 255, steps=5, queries=1000)
    assert found.many_steps == 1
    assert found.climbed == 0
    assert not found.passed


def test_what_bfloat16_rounds_in_a_training_step_does_not_stall(device):
    """1,000 steps of adversarial training's attack reach the border, as 7 do."""
    model, x, w = linear(device)
    x = x.bfloat16()
    y = model(x).argmax(1)
    gains = []
    for steps in (7, 1000):
        loss = AdversarialLoss(Adversarial(2 / 255, steps=steps, ramp=0.0), 10)
        z = loss.attacked(Function(model), x, y, 2 / 255, torch.zeros_like(x))
        gains.append(float(((z - x).float().flatten(1) @ w.sign()).abs().mean()))
    assert gains[1] >= 0.95 * gains[0]
