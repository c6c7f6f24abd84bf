"""The margin loss: no saturation, no scale, and cross entropy where that is sound."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from small_nets import convnet, images
from torch import nn
from torch.nn import functional

from lrmanifold.robustness import accuracy_under_attack, condition_number, fgsm, margin_loss, pgd

SCALES = (1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3, 1e6)
cross_entropy = functools.partial(functional.cross_entropy, reduction="none")


class Scaled(nn.Module):
    def __init__(self, net, factor):
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x):
        return self.net(x) * self.factor


def confident(device, dtype):
    """A network whose margins are about those of trained ones, and images that it gets right."""
    net = Scaled(convnet(device, dtype), 16)
    x, _ = images(device, count=100, dtype=dtype)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.03), ("l2", 0.12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_scale_of_the_logits_does_not_change_robust_accuracy(attack, norm, eps, dtype, device):
    net, x, y = confident(device, dtype)
    found = []
    for scale in SCALES:
        options = {"generator": torch.Generator().manual_seed(0)} if attack is pgd else {}
        accuracy = accuracy_under_attack(
            Scaled(net, scale), (x, y), attack, [eps], norm=norm, **options
        )
        found.append(accuracy[eps])
    assert 0.1 < found[3] < 0.95
    # five classes: the weights of the wrong ones depend a little on the scale inside 8..64
    assert max(found) - min(found) <= (0.05 if attack is pgd else 0.08), found


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_images_are_the_same_at_powers_of_two_outside_the_ordinary_range(norm, dtype, device):
    net, x, y = confident(device, dtype)
    small = (-4, -3) if dtype == torch.float16 else (-20, -9)
    large = (4, 8) if dtype == torch.float16 else (4, 20)  # float16 ends at 65504
    for pair in (small, large):
        z = [fgsm(Scaled(net, 2.0**k), x, y, 0.1, norm=norm) for k in pair]
        # the smallest logits of float16 have fewer bits
        torch.testing.assert_close(*z, rtol=0, atol=1e-3 if dtype == torch.float16 else 0)
        assert not torch.equal(z[0], x)


def test_cross_entropy_is_fooled_by_the_scale_and_the_default_is_not(device):
    """What the default is there for: this fails for cross entropy."""
    net, x, y = confident(device, torch.float32)
    for norm, eps in (("linf", 0.05), ("l2", 0.3)):
        found = {
            name: accuracy_under_attack(
                Scaled(net, 1e3), (x, y), fgsm, [eps], norm=norm, loss=loss
            )[eps]
            for name, loss in (("ce", cross_entropy), ("margin", margin_loss))
        }
        assert found["ce"] > 0.9
        assert found["margin"] < found["ce"] - 0.3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_at_ordinary_scale_attacks_are_those_of_cross_entropy(norm, device):
    net, x, _ = confident(device, torch.float64)
    y = torch.randint(0, 5, (100,), generator=torch.Generator().manual_seed(0)).to(device)
    torch.testing.assert_close(
        fgsm(net, x, y, 0.01, norm=norm),
        fgsm(net, x, y, 0.01, norm=norm, loss=cross_entropy), rtol=0, atol=1e-12,
    )  # fmt: skip
    both = [
        pgd(net, x, y, 0.01, norm=norm, steps=5, loss=loss, generator=torch.Generator())
        for loss in (margin_loss, cross_entropy)
    ]
    torch.testing.assert_close(*both, rtol=0, atol=1e-13)


def test_the_gradient_is_that_of_cross_entropy_over_one_minus_p(device):
    z = 4 * torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:, 0] = 6  # spread above 8 for all
    z[:, 1] = -6
    z = z.to(device).requires_grad_()
    y = torch.arange(50, device=device) % 6
    (g,) = torch.autograd.grad(margin_loss(z, y).sum(), z)
    (expected,) = torch.autograd.grad(cross_entropy(z, y).sum(), z)
    wrong = 1 - z.softmax(1).gather(1, y[:, None])
    torch.testing.assert_close(g, (expected / wrong).detach(), rtol=1e-7, atol=1e-12)


def test_equal_logits_have_a_finite_loss_and_gradient(device):
    z = torch.zeros(3, 4, device=device, requires_grad=True)
    value = margin_loss(z, torch.zeros(3, dtype=torch.int64, device=device))
    (g,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(value).all()
    torch.testing.assert_close(g[0].cpu(), torch.tensor([-1.0, 1 / 3, 1 / 3, 1 / 3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_almost_equal_logits_have_a_gradient_that_float16_holds(dtype, device):
    """Divided for that sample alone: the gradients of the others must not underflow for it."""
    z = torch.tensor([[0.0, 2.0**-20], [0.0, 4.0]], dtype=dtype, device=device, requires_grad=True)
    (g,) = torch.autograd.grad(margin_loss(z, torch.tensor([1, 1], device=device)).sum(), z)
    assert g.abs().amax(1).tolist() == [1024, 2]


# ---------------------------------------------------------------------- models of other kinds


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


@pytest.mark.parametrize(
    "wrap", [lambda z: (z, z), lambda z: [z], lambda z: {"logits": z}, Output, lambda z: None]
)
def test_models_that_do_not_return_a_tensor_get_a_named_error(wrap, device):
    net, x, y = confident(device, torch.float32)
    kind = type(wrap(x)).__name__

    def model(z):
        return wrap(net(z))

    message = rf"model must return a tensor of logits \(B, classes\), got an object of class {kind}"
    for call in (
        lambda: fgsm(model, x, y, 0.1),
        lambda: pgd(model, x, y, 0.1),
        lambda: accuracy_under_attack(model, (x, y), fgsm, [0.0]),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(TypeError, match=rf"f must return a tensor, got an object of class {kind}"):
        condition_number(model, x)


def test_logits_that_are_no_floating_point_numbers_are_named(device):
    _, x, y = confident(device, torch.float32)
    with pytest.raises(TypeError, match=r"floating point dtype, got torch\.int64"):
        accuracy_under_attack(lambda z: z.flatten(1).long(), (x, y), fgsm, [0.0])


def bound(net):
    return net.forward


def partial_of_bound(net):
    return functools.partial(net.forward)


def partial_of_module(net):
    return functools.partial(net)


@pytest.mark.parametrize("wrap", [bound, partial_of_bound, partial_of_module])
def test_what_is_bound_to_a_module_is_protected_like_the_module(wrap, device):
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(50, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5)
    ).to(device)
    x, y = images(device, dtype=torch.float32)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    calls = (
        lambda f: fgsm(f, x, y, 0.1),
        lambda f: pgd(f, x, y, 0.1, steps=2, generator=torch.Generator()),
        lambda f: accuracy_under_attack(f, (x.cpu(), y.cpu()), fgsm, [0.0, 0.1])[0.1],
    )
    model = wrap(net.train())
    for call in calls:
        protected = call(model)
        assert all(m.training for m in net.modules())
        expected = call(net)
        same = torch.equal if isinstance(expected, torch.Tensor) else float.__eq__
        assert same(protected, expected)
    assert torch.equal(condition_number(model, x), condition_number(net, x))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
