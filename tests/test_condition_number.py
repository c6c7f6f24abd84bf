"""The local condition number of a network: against dense Jacobians, closed forms, its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_nets import convnet, images, property_test
from torch import nn

from lrmanifold.robustness import condition_number


def dense_condition_number(f, x):
    """From the singular values of the whole Jacobian, one sample at a time."""
    numbers = []
    for one in x:
        J = torch.func.jacrev(lambda z: f(z[None])[0])(one).detach()
        out = f(one[None])[0].detach()
        sigma = torch.linalg.matrix_norm(J.reshape(out.numel(), one.numel()), 2)
        numbers.append(sigma * one.norm() / out.norm())
    return torch.stack(numbers)


def test_condition_number_of_a_network_equals_the_dense_one(device):
    net = convnet(device)
    x, _ = images(device)
    expected = dense_condition_number(net, x)
    torch.testing.assert_close(condition_number(net, x), expected, rtol=1e-8, atol=0)
    alone = torch.stack([condition_number(lambda z: net(z[None])[0], z, batched=False) for z in x])
    torch.testing.assert_close(alone, expected, rtol=1e-8, atol=0)
    single = condition_number(net.float(), x.float())
    torch.testing.assert_close(single.double(), expected, rtol=2e-5, atol=0)


def test_condition_number_where_outputs_are_images_and_kinks_and_pooling(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).to(device)
    net = net.double()
    x, _ = images(device)
    torch.testing.assert_close(
        condition_number(net, x), dense_condition_number(net, x), rtol=1e-8, atol=0
    )


@property_test
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    decay=st.sampled_from([0.0, 1e-3, 0.1, 2.0]),
    zeros=st.booleans(),
    exponent=st.sampled_from([-20, 0, 20]),
    seed=st.integers(0, 10**6),
)
def test_condition_number_of_a_linear_map_is_norm_times_x_over_ax(
    device, m, n, decay, zeros, exponent, seed
):
    """Also for equal and clustered singular values, kernels, and extreme scales."""
    generator = torch.Generator().manual_seed(seed)
    r = min(m, n)
    U = torch.linalg.qr(torch.randn(m, r, generator=generator).double()).Q
    V = torch.linalg.qr(torch.randn(n, r, generator=generator).double()).Q
    sigma = torch.exp(-decay * torch.arange(r).double()) * 10.0**exponent
    sigma[(r + 1) // 2 :] *= 0 if zeros else 1
    A = (U * sigma @ V.T).to(device)
    x = torch.randn(3, n, generator=generator).double().to(device)
    expected = sigma[0].item() * x.norm(dim=1) / (x @ A.T).norm(dim=1)
    torch.testing.assert_close(condition_number(lambda z: z @ A.T, x), expected, rtol=1e-7, atol=0)


def test_condition_number_of_a_map_that_is_locally_constant_is_zero(device):
    x = torch.rand(3, 4, device=device)
    assert torch.equal(condition_number(lambda z: 0 * z + 1, x), torch.zeros(3, device=device))


def test_condition_number_is_right_for_a_saturated_network_in_float32(device):
    """||J|| = 1e-25 squares to zero in float32."""
    A = 1e-25 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(device)
    x = torch.rand(2, 6, device=device)
    expected = torch.linalg.matrix_norm(A.double(), 2) * x.double().norm(dim=1) / 2
    found = condition_number(lambda z: z @ A.T + 1, x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


def test_condition_number_is_the_same_every_time_and_touches_no_global_random_state(device):
    net, (x, _) = convnet(device), images(device)
    before = torch.get_rng_state()
    first = condition_number(net, x)
    torch.rand(3)
    torch.set_rng_state(before)
    again = condition_number(net, x)
    if device.type == "cpu":
        assert torch.equal(first, again)
    else:  # sums of a backward pass may come in any order there
        torch.testing.assert_close(first, again, rtol=1e-4, atol=0)
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_steps_raise_instead_of_giving_a_lower_bound(device):
    A = torch.randn(60, 60, generator=torch.Generator().manual_seed(0)).double().to(device)
    x = torch.ones(2, 60, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="iters=3 steps"):
        condition_number(lambda z: z @ A.T, x, iters=3)
    rough = condition_number(lambda z: z @ A.T, x, iters=60, tol=1e-2)
    exact = condition_number(lambda z: z @ A.T, x)
    torch.testing.assert_close(rough, exact, rtol=1e-2, atol=0)


def test_a_run_that_started_beside_the_largest_singular_value_is_caught(device):
    """The first start has no part along e_0, so that run alone converges to 1 instead of 2."""
    sigma = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64, device=device)
    calls = []

    class Scale(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(z):
            return z * sigma

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            calls.append(1)
            g = g * sigma
            if len(calls) == 1:
                g = torch.cat([torch.zeros_like(g[:, :1]), g[:, 1:]], 1)
            return g

        @staticmethod
        def jvp(ctx, v):
            return v * sigma

    x = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64, device=device)
    found = condition_number(Scale.apply, x)
    torch.testing.assert_close(found, 2 * x.norm(dim=1) / (x * sigma).norm(dim=1))


@pytest.mark.parametrize(
    ("f", "x", "message"),
    [
        (lambda z: z, [[1.0, 2.0], [0.0, 0.0]], r"x must be finite and not zero.*\[1\]"),
        (lambda z: z - 1, [[1.0, 1.0]], r"f\(x\) must be finite and not zero.*\[0\]"),
        (lambda z: z, [[math.inf, 1.0]], "x must be finite"),
        (lambda z: z / 0, [[1.0, 1.0]], r"f\(x\) must be finite"),
        (lambda z: (z - 1).sqrt() + 1, [[1.0, 2.0]], "derivative of f is not finite"),
        (lambda z: z.sum(), [[1.0, 1.0]], "batched be False"),
        (lambda z: z[:1], [[1.0], [1.0]], "batched be False"),
    ],
)
def test_condition_number_is_refused_where_it_is_not_defined(f, x, message, device):
    with pytest.raises(ValueError, match=message):
        condition_number(f, torch.tensor(x, dtype=torch.float64, device=device))


def test_condition_number_refuses_half_precision_and_wrong_counts(device):
    x = torch.ones(2, 3, device=device)
    with pytest.raises(TypeError, match="float32 or float64"):
        condition_number(lambda z: z, x.half())
    with pytest.raises(ValueError, match="iters must be"):
        condition_number(lambda z: z, x, iters=0)
    with pytest.raises(ValueError, match="tol must be"):
        condition_number(lambda z: z, x, tol=-1.0)


def test_samples_that_are_one_number_and_functions_of_any_shape(device):
    x = torch.tensor([3.0, 4.0], dtype=torch.float64, device=device)

    def number(f, x):
        return float(condition_number(f, x, batched=False))

    assert number(lambda q: (q**2).sum(), x) == pytest.approx(2)  # |2x| |x| / |x|^2
    assert number(lambda q: torch.stack((q, q)), x[0]) == pytest.approx(1)
    assert number(lambda q: q**3, x[0]) == pytest.approx(3)
    found = condition_number(lambda q: q.sum(1), torch.stack((x, 2 * x)))
    assert found.tolist() == pytest.approx([math.sqrt(2) * 5 / 7] * 2)
    assert condition_number(lambda q: q**2, x).tolist() == pytest.approx([2, 2])


def test_a_function_that_autograd_does_not_reach_is_no_constant():
    x, net = torch.ones(3, 2, dtype=torch.float64), nn.Linear(2, 2).double()
    for f in (torch.Tensor.detach, lambda z: net(z.detach())):
        with pytest.raises(ValueError, match="does not depend differentiably on x"):
            condition_number(f, x)
    assert condition_number(lambda z: 0 * z + 1, x).tolist() == [0, 0, 0]
