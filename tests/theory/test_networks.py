"""The claims about condition numbers of layers and networks, at drawn seeds and sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from theory import networks
from theory.networks import (
    activations,
    bias,
    chain_rule,
    convolution_condition,
    convolution_corrected,
    convolution_counterexample,
    convolution_norm,
    corrected_product,
    plain_product,
    residual,
)
from theory.networks.convolutions import convolve, operator
from theory.networks.random_networks import bounds, condition, leaky, random_net
from theory.runner import Settings, verify_control
from theory.sampling import Draw

F64 = torch.float64
DTYPES = (F64, torch.float32)
seeds = st.integers(0, 2**31 - 1)


def agrees(evidence) -> bool:
    """The check accepts the sample, or it is outside of the hypotheses."""
    return evidence.holds or not evidence.hypotheses_met


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("claim", networks.CLAIMS, ids=lambda c: c.id)
@given(seed=seeds)
def test_claim_holds(device, dtype, claim, seed):
    evidence = claim.check(claim.sample(seed, dtype, device))
    assert agrees(evidence), evidence


@given(m=st.integers(1, 9), n=st.integers(1, 9), cond=st.floats(1, 1e3), seed=seeds)
def test_bias_bound_at_any_conditioning(device, m, n, cond, seed):
    sample = bias.sample(seed, F64, device, m=m, n=n, r=min(m, n), cond=cond)
    assert bias.check(sample).holds


@given(tau=st.sampled_from((0.0, 0.1)), rank=st.integers(1, 6), seed=seeds)
def test_plain_product_bound_fails_near_every_kernel(device, tau, rank, seed):
    sample = plain_product.sample(seed, F64, device, rank=rank, tau=tau)
    assert plain_product.check(sample).detail["violated near a kernel"] == 1.0


@given(tau=st.sampled_from((0.0, 0.1, 1.0)), seed=seeds)
def test_plain_product_bound_is_right_without_a_kernel(device, tau, seed):
    sample = plain_product.sample(seed, F64, device, rank=plain_product.SIZE, tau=tau)
    b = bounds(sample["net"], sample["x"])
    assert bool((b.measured <= b.plain * (1 + 1e-10)).all())


def test_bounds_measure_the_jacobian_that_autograd_finds(device):
    net = random_net(Draw(0, F64, device), batch=1, sizes=(6, 5, 4), rank=3, tau=0.5)
    x = torch.randn(1, 6, dtype=F64, device=device)
    W1, W2 = (W[0] for W in net.weights)
    found = condition(lambda z: W2 @ leaky(W1 @ z), x[0])
    assert float(bounds(net, x).measured[0]) == pytest.approx(float(found), rel=1e-12)


@pytest.mark.parametrize("padding", ["circular", "full", "same", "valid"])
@pytest.mark.parametrize("stride", [1, 2])
def test_operator_is_the_convolution(device, padding, stride):
    kernel = torch.randn(3, 2, 3, 3, dtype=F64, device=device)
    x = torch.randn(1, 2, 6, 6, dtype=F64, device=device)
    y = convolve(x, kernel, padding, stride)
    assert torch.allclose(operator(kernel, 6, padding, stride) @ x.flatten(), y.flatten())
    if padding != "circular":
        pad = {"full": 2, "same": 1, "valid": 0}[padding]
        assert torch.allclose(y, functional.conv2d(x, kernel, stride=stride, padding=pad))


def test_difference_filter_kills_constant_images(device):
    sample = convolution_counterexample.sample(0, F64, device)
    x = torch.ones(1, 1, 4, 4, dtype=F64, device=device)
    assert float(convolve(x, sample["kernel"], "circular").abs().max()) < 1e-15


@pytest.mark.parametrize(
    ("module", "extremal"),
    [
        (chain_rule, chain_rule.aligned),
        (corrected_product, corrected_product.attained),
        (convolution_norm, convolution_norm.constant_kernel),
        (convolution_condition, lambda *a: convolution_condition.sample(*a, orthonormal=True)),
        (convolution_corrected, convolution_corrected.constant),
        (residual, residual.opposite),
        (bias, bias.small_bias),
        (activations, lambda *a: activations.extremal(*a, names=activations.ZERO_AT_ZERO)),
    ],
    ids=lambda x: getattr(x, "__name__", "").split(".")[-1],
)
def test_sharp_constant_is_attained_by_its_extremal_example(device, module, extremal):
    for seed in range(8):
        evidence = module.check(extremal(seed, F64, device))
        assert evidence.holds
        assert evidence.ratio > 0.98


def test_kernels_without_full_column_rank_are_outside_of_the_conditioning_bounds(device):
    sample = convolution_condition.sample(0, F64, device, full_rank=False)
    assert not convolution_condition.check(sample).hypotheses_met


def test_a_residual_branch_with_q_1_is_outside_of_the_bound(device):
    assert not residual.check(residual.opposite(0, F64, device, q=1.0)).hypotheses_met


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("claim", "control"),
    [(c, k) for c in networks.CLAIMS for k in c.controls],
    ids=lambda x: getattr(x, "id", None) or x.name,
)
def test_control_is_rejected(device, dtype, claim, control):
    found = verify_control(claim, control, Settings(trials=2, dtype=dtype, device=device))
    assert found.passed, found
