"""Networks that once got a bound too small, or a certificate for another model than theirs."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from lrmanifold import certify
from lrmanifold.nn import ConvexPotential

D = torch.float64


def jacobian(model, shape, x=None):
    x = torch.rand(1, *shape, dtype=D) if x is None else x
    return torch.autograd.functional.jacobian(lambda z: model(z).flatten(), x).flatten(1)


def norm_of(model, shape):
    return float(torch.linalg.matrix_norm(jacobian(model, shape).reshape(-1, *[_size(shape)]), 2))


def _size(shape):
    return int(torch.tensor(shape).prod())


class Context(nn.Module):
    """x plus a function of its mean over all pixels."""

    def __init__(self, channels, kernel):
        super().__init__()
        self.pool, self.mix = nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.constant_(self.mix.weight, kernel)

    def forward(self, x):
        return x + self.mix(self.pool(x))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.floats(-6, 6))
@settings(max_examples=25, deadline=None)
def test_a_sum_that_broadcasts_counts_its_copies(channels, height, width, kernel):
    model = Context(channels, kernel).double()
    shape = (channels, height, width)
    assert certify.lipschitz(model, shape).total >= norm_of(model, shape) * (1 - 1e-12)


def test_the_radius_of_a_network_with_a_broadcast_sum_holds():
    model = nn.Sequential(Context(1, 5.0), nn.Flatten(), nn.Linear(64, 2)).double()
    with torch.no_grad():
        model[2].weight.copy_(torch.stack((torch.ones(64), -torch.ones(64))))
        model[2].bias.zero_()
    x = torch.full((1, 1, 8, 8), 0.1, dtype=D)
    r = float(certify.radius(model, x))
    assert 0.75 < r <= 0.8 + 1e-9  # at 0 the classes meet, 8 * 0.1 away


def test_a_sum_with_fewer_dimensions_is_refused():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            return x + self.pool(x).flatten(1)

    with pytest.raises(certify.BoundError, match="dimension"):
        certify.lipschitz(Vector(), (2, 2, 2))


@pytest.mark.parametrize("name", ["add", "sub_"])
def test_a_layer_may_be_named_like_a_sum(name):
    layer = nn.Linear(8, 2, bias=False, dtype=D)
    found = certify.lipschitz(nn.Sequential(OrderedDict({name: layer})), (8,)).total
    assert found >= float(torch.linalg.matrix_norm(layer.weight.detach(), 2))


def test_a_factor_of_zero_leaves_nothing():
    assert certify.lipschitz(Times(0.0), (2,)).total == 0.0


class Times(nn.Module):
    def __init__(self, value, divide=False):
        super().__init__()
        self.divide = divide
        if isinstance(value, torch.Tensor):
            self.register_buffer("value", value)
        else:
            self.value = value

    def forward(self, x):
        return x / self.value if self.divide else x * self.value


@given(st.floats(1e-300, 1e300), st.booleans())
@settings(max_examples=100, deadline=None)
def test_numbers_of_the_forward_are_not_rounded_down(value, divide):
    exact = 1.0 / value if divide else value
    found = certify.lipschitz(Times(value, divide), (2,)).total
    assert exact <= found <= exact * (1 + 1e-9) + 1e-300


@pytest.mark.parametrize("value", [16777217, 2**53 + 1, 1e40, 0.7, 1e-50])
def test_single_numbers(value):
    assert certify.lipschitz(Times(value), (2,)).total >= float(value)


def test_buffers_of_every_kind():
    ints = torch.tensor([-128, 1], dtype=torch.int8)
    assert certify.lipschitz(Times(ints), (2,)).total >= 128
    assert certify.lipschitz(Times(ints[0]), (2,)).total >= 128
    mask = certify.lipschitz(Times(torch.tensor([True, False])), (2,)).total
    assert mask == pytest.approx(1.0)
    with pytest.raises(certify.BoundError, match="finite"):
        certify.lipschitz(Times(torch.zeros(2), divide=True), (2,))


def test_a_learned_scale_keeps_its_gradient_and_dtype():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(-3.0))

        def forward(self, x):
            return x * self.scale

    model = Scale()
    total, _, _ = certify.LipschitzBound(model, (2,)).evaluate()
    assert total.dtype == torch.float32
    total.backward()
    assert float(model.scale.grad) == -1.0


def test_products_below_the_smallest_number_stay_above_zero():
    first, second = (nn.Linear(2, 2, bias=False, dtype=D) for _ in range(2))
    for layer in (first, second):
        layer.weight.data = torch.eye(2, dtype=D) * 1e-163
    x = torch.tensor([[1.0, 0.5]], dtype=D)
    assert certify.lipschitz(nn.Sequential(first, second), (2,)).total > 0
    r = float(certify.radius(first, x))
    assert 0.3 < r <= 0.5 / 2**0.5 * (1 + 1e-12)


@pytest.mark.parametrize("size", [1e-170, 1e-158, 1e158])
def test_branches_side_by_side_are_not_squared_out_of_the_range(size):
    """At 1e-170 the bound was 3e-138, and a radius 3e14."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2, bias=False, dtype=D)
            self.head.weight.data = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]], dtype=D) / size

        def forward(self, x):
            a = x * size
            return self.head(torch.cat((a, a), 1))

    exact = certify.lipschitz(Both(), (2,)).total
    assert 2.0 <= exact <= 2.0 * (1 + 1e-9)
    if size > 1e-160:  # power iterations of dense weights square them, too
        return
    network = certify.LipschitzBound(Both(), (2,))
    assert float(network.walk(exact=False).total["cat"]) == pytest.approx(2**0.5 * size)


def test_what_underflows_in_the_forward_counts_in_the_radius():
    """In exact arithmetic the class is the other one: 1e-322 has no digits to be multiplied up."""
    layers = [nn.Linear(2, 2, bias=False, dtype=D) for _ in range(4)]
    head = nn.Linear(2, 2, dtype=D)
    for layer, scale in zip([*layers, head], (1e-161, 1e-161, 1e161, 1e161, 1.0), strict=True):
        layer.weight.data = scale * torch.eye(2, dtype=D)
    head.bias.data = torch.tensor([0.999, 0.0], dtype=D)
    x = torch.tensor([[0.0, 1.0]], dtype=D)
    assert certify.radius(nn.Sequential(*layers, head), x).item() == 0.0


def test_a_jump_is_told():
    report = certify.lipschitz(nn.Sequential(nn.Linear(2, 2), nn.Softplus()), (2,))
    assert [row.jump > 0 for row in report.rows] == [False, True]
    assert "but for the jumps of 1" in str(report)
    assert "jumps" not in str(certify.lipschitz(nn.Softplus(threshold=800).double(), (2,)))


class StageA1x(nn.MaxPool2d):
    """A name that ends like another dimension's."""


class Down(nn.AvgPool2d):
    pass


def test_the_dimension_of_a_pooling_is_not_read_from_its_name():
    same = certify.lipschitz(nn.MaxPool2d(3, stride=1), (1, 5, 5)).total
    assert certify.lipschitz(StageA1x(3, stride=1), (1, 5, 5)).total == same
    assert certify.lipschitz(Down(2), (1, 4, 4)).total == pytest.approx(0.5)
    assert certify.lipschitz(nn.MaxPool2d((2,)), (1, 4, 4)).total == pytest.approx(1.0)


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(0, 2), st.integers(1, 9), st.integers(1, 9),
    st.booleans(), st.booleans(),
)  # fmt: skip
@example(3, 3, 1, 1, 9, False, True)
@example(3, 3, 1, 1, 1, False, False)
@example(5, 5, 2, 1, 2, False, True)
@settings(max_examples=60, deadline=None)
def test_average_pooling_at_the_edges(kernel, stride, pad, height, width, counted, shaped):
    pad = min(pad, kernel // 2)
    if min(height, width) + 2 * pad < kernel:
        return
    pool = nn.AvgPool2d(kernel, stride, pad, count_include_pad=counted).double()
    found = certify.lipschitz(pool, (1, height, width) if shaped else None).total
    assert found >= norm_of(pool, (1, height, width)) * (1 - 1e-12)


def _gain(self, x, gain):
    return gain * torch.relu(x)


class Gain(nn.ReLU):
    forward = functools.partialmethod(_gain, gain=100.0)


def test_a_replaced_forward_that_is_no_function_is_seen():
    with pytest.raises(certify.BoundError):
        certify.lipschitz(Gain(), (2,))
    layer = nn.Linear(2, 2)
    found = certify.lipschitz(nn.Sequential(layer, Gain()), (2,))  # followed into its forward
    assert found.total >= 100 * float(torch.linalg.matrix_norm(layer.weight.detach(), 2))


def test_celu_needs_a_positive_alpha():
    assert certify.lipschitz(nn.CELU(2.0), (1,)).total == pytest.approx(1.0)
    with pytest.raises(certify.BoundError, match="alpha"):
        certify.lipschitz(nn.CELU(-1.0), (1,))


class Branch(nn.Module):
    def __init__(self, turn):
        super().__init__()
        self.turn = turn

    def forward(self, x):
        if isinstance(x, torch.Tensor) and self.turn(x):
            x = x * 100
        return x


@pytest.mark.parametrize("turn", [lambda x: x.max() > 1, lambda x: x.min() < 0])
def test_what_happens_to_large_and_to_negative_values_only_is_seen(turn):
    with pytest.raises(certify.BoundError, match="trace does not see"):
        certify.lipschitz(Branch(turn), (2,))


def test_the_same_bits_read_as_other_numbers_are_refused():
    class Bits(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(2, 2, bias=False, dtype=D)

        def forward(self, x):
            return (self.l(x).view(torch.float32) * 3.0).view(D)

    with pytest.raises(certify.BoundError, match="view"):
        certify.lipschitz(Bits(), (2,))


def test_a_forward_on_the_object_is_refused_without_input_shape_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(2, 2)

        def forward(self, x):
            return self.l(x)

    model = Net()
    before = model.forward
    model.forward = lambda x: 100 * before(x)
    for shape in (None, (2,)):
        with pytest.raises(certify.BoundError, match="own forward"):
            certify.lipschitz(model, shape)


def test_a_report_is_stale_after_a_change_of_a_plain_number_and_after_a_hook():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.s = nn.Linear(2, 2), 1.0

        def forward(self, x):
            return self.l(x * self.s)

    x = torch.rand(3, 2)
    model = Net()
    report = certify.lipschitz(model, (2,))
    certify.radius(model, x, bound=report)
    model.s = 100.0
    with pytest.raises(ValueError, match="make it anew"):
        certify.radius(model, x, bound=report)
    model = nn.Sequential(nn.Linear(2, 2))
    report = certify.lipschitz(model, (2,))
    model[0].register_forward_hook(lambda module, args, output: -100 * output)
    with pytest.raises(ValueError, match="make it anew"):
        certify.radius(model, x, bound=report)


def test_pruned_and_normed_layers_are_told_the_way_out():
    pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 2)
    with pytest.raises(certify.BoundError, match="weight_norm"):
        certify.lipschitz(pruned, (4,))


def test_map_cond_is_on_the_row_space():
    ones = nn.Linear(4, 4, bias=False)
    nn.init.ones_(ones.weight)
    assert certify.lipschitz(ones, (4,)).rows[0].map_cond == pytest.approx(1.0)
    down = nn.Conv2d(4, 8, 1, stride=2, bias=False)
    expected = float(torch.linalg.cond(down.weight.detach().flatten(1)))
    assert certify.lipschitz(down, (4, 8, 8)).rows[0].map_cond == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "module",
    [nn.LeakyReLU(math.nan), nn.ELU(math.nan), nn.Softplus(1.0, math.nan)],
    ids=lambda m: type(m).__name__,
)
def test_a_slope_that_is_no_number_has_no_bound(module):
    """Python's max(1, NaN) is 1."""
    with pytest.raises(certify.BoundError, match=type(module).__name__):
        certify.lipschitz(nn.Sequential(nn.Linear(4, 4), module), (4,))


def test_a_convex_potential_without_a_weight_has_no_bound():
    block = ConvexPotential(4, 2)
    with torch.no_grad():
        block.layer.S.zero_()
    with pytest.raises(
        certify.BoundError, match=r"0 .ConvexPotential.: its weight must not be zero"
    ):
        certify.lipschitz(nn.Sequential(block), (4,))
