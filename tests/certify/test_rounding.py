"""What rounding does is bounded, too: against arithmetic of fifty digits, or exact."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lrmanifold import certify, linalg
from lrmanifold.certify import bounds as registry
from lrmanifold.nn import ConvexPotential

D = torch.float64
UNIT = 2.0**-53


def exact(value) -> Decimal:
    return Decimal(float(value))


def allowed(module, x):
    """The error that the certificate counts for one sample x."""
    report = certify.lipschitz(module, tuple(x.shape[1:]))
    (bound,) = report.walked.local.values()
    return UNIT * (bound.slope * float(x.norm()) + bound.offset)


def elu(x, alpha, inner=Decimal(1)):
    return x if x > 0 else alpha * ((x / inner).exp() - 1)


CASES = {
    "leaky": (lambda a: nn.LeakyReLU(a), lambda x, a: x if x > 0 else a * x),
    "rrelu": (lambda a: nn.RReLU(a, a), lambda x, a: x if x > 0 else a * x),
    "elu": (lambda a: nn.ELU(a), elu),
    "celu": (lambda a: nn.CELU(a), lambda x, a: elu(x, a, a)),
    "softplus": (lambda a: nn.Softplus(1 / a, 40.0), lambda x, a: a * (1 + (x / a).exp()).ln()),
}


@given(
    st.sampled_from(sorted(CASES)),
    st.integers(0, 12),
    st.integers(-6, 3),
    st.floats(0.5, 1.0),
    st.integers(0, 10_000),
)
@settings(max_examples=150, deadline=None)
def test_activations_are_rounded_within_what_is_counted(name, large, size, share, seed):
    make, truth = CASES[name]
    alpha = share * 10.0**large
    generator = torch.Generator().manual_seed(seed)
    x = -(10.0**size) * torch.rand(1, 20, dtype=D, generator=generator)
    module = make(alpha).eval()
    try:
        room = allowed(module, x)
    except certify.BoundError:
        return  # a softplus whose jump can be seen
    with localcontext() as context:
        context.prec = 60
        a = exact(alpha) if name != "softplus" else 1 / exact(module.beta)
        wrong = [
            float(exact(y) - truth(exact(v), a)) for y, v in zip(module(x)[0], x[0], strict=True)
        ]
    assert math.hypot(*wrong) <= room


def test_the_radius_of_a_softplus_that_is_nearly_straight():
    # its values are near 7e9, so its logits are multiples of 1e-6
    model = nn.Sequential(nn.Softplus(beta=1e-10, threshold=200.0))
    x = torch.tensor([[1.12e-6, 1.10e-6]], dtype=D)
    z = model(x)
    assert float(z[0, 0] - z[0, 1]) > 30 * float(x[0, 0] - x[0, 1])
    assert float(certify.radius(model, x)) <= float(x[0, 0] - x[0, 1]) / math.sqrt(2.0)


@pytest.mark.parametrize("steep", [nn.PReLU(init=1e8), nn.LeakyReLU(1e8)], ids=repr)
def test_steep_lines_are_rounded_at_the_size_of_their_output(steep):
    x = -torch.rand(1, 50, dtype=D, generator=torch.Generator().manual_seed(0))
    a = Fraction(1e8)
    wrong = [
        float(Fraction(float(y)) - a * Fraction(float(v)))
        for y, v in zip(steep.double()(x).detach()[0], x[0], strict=True)
    ]
    assert 1e5 * UNIT < math.hypot(*wrong) <= allowed(steep, x)


def test_sums_of_pooling_windows_are_rounded_at_the_size_of_their_output():
    # one large pixel, and a hundred that are lost or rounded up each time they are added
    pool = nn.AvgPool2d(10, 1, divisor_override=1).double()
    x = torch.full((1, 1, 19, 19), 1.001 * UNIT, dtype=D)
    x[0, 0, 9, 9] = 1.0
    rows = [[Fraction(float(v)) for v in row] for row in x[0, 0]]
    wrong = [
        float(Fraction(float(y)) - sum(sum(row[j : j + 10]) for row in rows[i : i + 10]))
        for i, line in enumerate(pool(x)[0, 0])
        for j, y in enumerate(line)
    ]
    assert math.hypot(*wrong) <= allowed(pool, x)
    # whatever the order of the sums, each of the hundred windows may be off by 99 roundings of 1
    assert allowed(pool, x) >= 10 * 99 * UNIT


@pytest.mark.parametrize("mode", ["replicate", "zeros"])
def test_copies_that_padding_makes_are_rounded_each(mode):
    layer = nn.Conv1d(1, 1, 1, padding=2000, padding_mode=mode, bias=False).double()
    with torch.no_grad():
        layer.weight.fill_(1.0 + 1 / 3)
    x = torch.tensor([[[1.0 + 1e-9]]], dtype=D)
    truth = Fraction(float(layer.weight.detach())) * Fraction(float(x))
    y = layer(x).detach().flatten()
    y = y[y != 0]
    error = float(Fraction(float(y[0])) - truth)
    largest = math.sqrt(len(y)) * UNIT * abs(float(truth))
    assert math.sqrt(len(y)) * abs(error) <= allowed(layer, x)
    assert allowed(layer, x) >= largest


def test_a_potential_on_many_positions_is_rounded_at_each():
    layer = ConvexPotential(2, 1, 500, dtype=D)
    few, many = (certify.lipschitz(layer, (n, 2)).walked.local for n in (1, 10_000))
    (one,), (all_of_them,) = few.values(), many.values()
    assert all_of_them.offset >= 99 * one.offset


@pytest.mark.parametrize("hidden", [2, 5_000])
def test_a_potential_counts_the_products_of_its_bias(hidden):
    """Qᵀ σ(b) may be off by a rounding of ‖b‖ for each of its terms."""
    layer = ConvexPotential(2, 1, hidden, dtype=D)
    with torch.no_grad():
        layer.layer.bias.fill_(3.0)
    (bound,) = certify.lipschitz(layer, (2,)).walked.local.values()
    products = 2 * linalg.rounding_of_products(hidden) * float(layer.layer.bias.norm())
    assert UNIT * bound.offset >= products


def test_a_plain_number_stands_for_a_few_roundings_of_the_output(monkeypatch):
    class Grow(nn.Module):
        def forward(self, x):
            return x * 1e6 / 3

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    certify.register_bound(Grow, lambda module, context: 1e6 / 3 * (1 + 1e-9))
    x = torch.rand(1, 50, dtype=D, generator=torch.Generator().manual_seed(0))
    wrong = [
        float(Fraction(float(y)) - Fraction(float(v)) * 10**6 / 3)
        for y, v in zip(Grow()(x)[0], x[0], strict=True)
    ]
    assert 1e3 * UNIT < math.hypot(*wrong) <= allowed(Grow(), x)


@given(st.floats(1e-6, 10.0), st.integers(1, 4), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_classes_that_only_a_bias_keeps_apart_meet_by_rounding_far_away(gap, width, seed):
    """Equal rows: in exact arithmetic no input changes the class, in float64 a large one does."""
    torch.manual_seed(seed)
    head = nn.Linear(width, 2, dtype=D)
    with torch.no_grad():
        head.weight[1] = head.weight[0]
        head.bias[1] = head.bias[0] + gap
    model = nn.Sequential(nn.Linear(width, width, dtype=D), head)
    x = torch.randn(1, width, dtype=D)
    assert model(x).argmax() == 1
    r = float(certify.radius(model, x))
    assert 1.0 < r < math.inf
    away = torch.randn(64, width, dtype=D)
    away = x + r * away / away.norm(dim=1, keepdim=True)
    assert bool((model(away).argmax(1) == 1).all())


def test_where_nothing_depends_on_the_input_every_radius_is_right():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.zero_()
    assert float(certify.radius(model, torch.randn(1, 3))) == math.inf
