"""How far the outputs of a model and its twin can be apart: T3, layer by layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lrmanifold as lrm
from lrmanifold.monitor._output_bound import output_bound


@pytest.mark.parametrize("certified", [False, True])
def test_outputs_are_no_farther_apart_than_their_bound(certified):
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(54, 12), nn.ReLU(), nn.Linear(12, 4),
    ).double()  # fmt: skip
    model = lrm.factorize(dense, rank=3, tau=0.2, exclude="6", keep_larger=True)
    reference = lrm.densify(copy.deepcopy(model))
    x, y = torch.randn(32, 1, 12, 12).double(), torch.randint(4, (32,))

    def loss(net):
        return nn.functional.cross_entropy(net(x), y)

    optimizer = lrm.optim.CondLR(model.parameters(), lr=0.05)
    full = torch.optim.SGD(reference.parameters(), lr=0.05)
    monitor = lrm.monitor(model, optimizer, reference=reference, loss=loss)
    assert float(monitor.output_bound(x).max()) < 1e-9  # the same function at the start
    for _ in range(5):
        for net, rule in ((model, optimizer), (reference, full)):
            rule.zero_grad()
            loss(net).backward()
            rule.step()
        monitor.step()
    bound = monitor.output_bound(x, certified=certified)
    with torch.no_grad():
        apart = (model(x) - reference(x)).norm(dim=1)
    assert bound.shape == (32,)
    assert bool((apart > 0).all())
    assert bool((apart <= bound).all())
    assert float(bound.median()) < 300 * float(apart.median())


def test_a_bias_counts_at_every_place_of_a_sequence():
    torch.manual_seed(0)
    model = nn.Sequential(lrm.nn.LowRankLinear(4, 3, 2, dtype=torch.float64))
    reference = lrm.densify(copy.deepcopy(model))
    with torch.no_grad():
        reference[0].bias.add_(1.0)
    monitor = lrm.monitor(
        model, lrm.optim.CondLR(model.parameters(), lr=0.1), reference=reference,
        loss=lambda net: net(torch.ones(1, 4).double()).sum(),
    )  # fmt: skip
    x = torch.zeros(2, 16, 4, dtype=torch.float64)
    apart = (model(x) - reference(x)).flatten(1).norm(dim=1)
    assert bool((apart <= monitor.output_bound(x, certified=True) * (1 + 1e-12)).all())


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_circular_padding_shows_a_pixel_to_more_patches(n, k, stride, data):
    """Padding wider than the kernel repeats patches: at n = k = pad = 3 the bound was 1.5 short."""
    pad = data.draw(st.integers(0, n))
    if n + 2 * pad < k:
        return
    options = {"stride": stride, "padding": pad, "padding_mode": "circular", "bias": False}
    theirs = nn.Sequential(nn.Conv1d(1, 1, k, **options)).double().requires_grad_(False)
    ours = copy.deepcopy(theirs)
    ours[0].weight.add_(1.0)  # at an image of ones no other change of that length does more
    x = torch.ones(1, 1, n, dtype=torch.float64)
    apart = float((ours(x) - theirs(x)).norm())
    assert apart <= float(output_bound(ours, theirs, x, math.sqrt(k))) * (1 + 1e-12)


class Other(nn.Module):
    def forward(self, x):
        return 2.0 * x if isinstance(x, torch.Tensor) else x


class Doubled(nn.ReLU):
    def forward(self, x):
        return 2.0 * super().forward(x)


def test_networks_without_a_bound_of_outputs_are_refused():
    for layer, reason in (
        (Other(), "its traced graph"), (nn.LayerNorm(8), "no global Lipschitz constant"),
        (nn.Softplus(threshold=0), "jumps by"), (nn.Softplus(), "without jumps, got 1"),
    ):  # fmt: skip
        dense = nn.Sequential(nn.Linear(8, 8), layer).double()
        model = lrm.factorize(dense, rank=2, tau=0.1, keep_larger=True)
        monitor = lrm.monitor(
            model, lrm.optim.CondLR(model.parameters(), lr=0.1),
            reference=lrm.densify(copy.deepcopy(model)),
            loss=lambda net: net(torch.ones(1, 8).double()).sum(),
        )  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            monitor.output_bound(torch.ones(1, 8))


class Times(nn.Linear):
    def forward(self, x):
        return 9.0 * super().forward(x)


class Scaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 10.0 * weight, bias)


def own_forward(module):
    inner = module.forward
    module.forward = lambda x: 9.0 * inner(x)
    return module


def hooked(module, before=False):
    if before:
        module.register_forward_pre_hook(lambda module, args: (9.0 * args[0],))
    else:
        module.register_forward_hook(lambda module, args, output: 9.0 * output)
    return module


def test_what_has_a_function_of_its_own_has_no_bound_of_outputs():
    """What it does to a difference was taken for the norm of its weight, or for nothing."""
    for net, reason in (
        (nn.Sequential(nn.Linear(8, 8), Times(8, 8)), "calls linear"),
        (nn.Sequential(nn.Linear(8, 8), hooked(nn.Linear(8, 8))), "hooks"),
        (nn.Sequential(nn.Linear(8, 8), own_forward(nn.Linear(8, 8))), "own forward"),
        (nn.Sequential(nn.Linear(8, 8), hooked(nn.ReLU(), before=True)), "hooks"),
        (hooked(nn.Sequential(nn.Linear(8, 8))), "hooks"),
        (own_forward(nn.Sequential(nn.Linear(8, 8))), "own forward"),
        (nn.Sequential(nn.Unflatten(1, (1, 2, 4)), Scaled(1, 1, 1)), "calls conv2d"),
    ):
        with pytest.raises(ValueError, match=reason):
            output_bound(net, net, torch.ones(1, 8), None)


def convolution(value, size=1, **options):
    layer = nn.Conv2d(1, 1, size, bias=False, **options)
    nn.init.constant_(layer.weight, value)
    return layer


def test_outputs_of_layers_that_compute_otherwise_stay_within_the_bound():
    """The twin's geometry, or 1 for every activation and pooling, made bounds too small."""
    wide, there = {"padding": 1, "padding_mode": "circular"}, {"padding": 1}
    pairs = [
        (nn.AvgPool2d(2, 2, 1), nn.AvgPool2d(2, 2, 1, count_include_pad=False)),
        (nn.Sequential(convolution(1.0), convolution(1.0, 3, **wide)),
         nn.Sequential(convolution(0.9), convolution(1.0, 3, **there))),
        (nn.Sequential(convolution(1.0), nn.ReLU()), nn.Sequential(convolution(0.9), nn.Tanh())),
        *(
            (nn.Sequential(convolution(-1.0), layer), nn.Sequential(convolution(-0.9), layer))
            for layer in (
                nn.GELU(), nn.MaxPool2d(3, 2), nn.LeakyReLU(-2.0), nn.ELU(-3.0),
                nn.AvgPool2d(2, divisor_override=1), nn.ReLU(inplace=True), nn.Dropout(),
                Doubled(),
            )
        ),
    ]  # fmt: skip
    x = torch.cat((torch.ones(1, 1, 4, 4), torch.randn(3, 1, 4, 4))).double()
    for ours, theirs in pairs:
        ours, theirs = ours.double().eval(), theirs.double().eval()
        before = x.clone()
        bound = output_bound(ours, theirs, x, None)
        assert torch.equal(x, before)
        with torch.no_grad():
            apart = (ours(x.clone()) - theirs(x.clone())).flatten(1).norm(dim=1)
        assert bool((apart <= bound * (1 + 1e-12) + 1e-12).all()), (ours, apart, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_bound_of_outputs_is_about_the_stored_numbers(dtype):
    """``double()`` takes the drift of a shorter dtype out of a weight: another function."""
    low = lrm.nn.LowRankLinear(64, 64, 32, bias=False, tau=0.0).to(dtype)
    U, S, V = (f.detach() for f in copy.deepcopy(low).double().factors)
    reference = nn.Linear(64, 64, bias=False).double()
    x = torch.randn(2, 64, dtype=dtype)
    with torch.no_grad():
        reference.weight.copy_(U @ S @ V.mT)
        stored = [f.detach().double() for f in low.factors]
        apart = x.double() @ (stored[0] @ stored[1] @ stored[2].mT).mT - reference(x.double())
    bound = output_bound(low, reference, x, None)
    assert bool((apart.norm(dim=1) <= bound * (1 + 1e-6) + 1e-12).all())


def test_a_certified_bound_of_outputs_needs_layers_used_once_and_the_weights_of_the_last_step():
    torch.manual_seed(0)
    low = lrm.nn.LowRankLinear(4, 4, 4, bias=False, tau=0.0, dtype=torch.float64)
    shared = nn.Linear(4, 4, bias=False).double()
    x = torch.ones(1, 4, dtype=torch.float64)

    def watched(*after):
        model, reference = nn.Sequential(low, *after), nn.Sequential(low.to_dense(), *after)
        reference = copy.deepcopy(reference)
        optimizer = lrm.optim.CondLR(model.parameters(), lr=1e-3)
        loss = lambda net: net(x).square().sum()  # noqa: E731
        return reference, lrm.monitor(model, optimizer, reference=reference, loss=loss)

    _, monitor = watched(shared, nn.Tanh(), shared)
    monitor.output_bound(x)
    with pytest.raises(ValueError, match="used once only"):
        monitor.output_bound(x, certified=True)
    _, monitor = watched(nn.PReLU().double())
    with pytest.raises(ValueError, match="chain"):
        monitor.output_bound(x, certified=True)
    reference, monitor = watched(shared)
    assert float(monitor.output_bound(x, certified=True)) < 1e-12
    with torch.no_grad():
        reference[0].weight.add_(1.0)
    with pytest.raises(ValueError, match="moved since"):
        monitor.output_bound(x, certified=True)


def test_an_output_bound_needs_as_many_layers():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    with pytest.raises(ValueError, match="the same layers, got 2 and 1"):
        output_bound(net, net[:1], torch.ones(1, 8), None)
