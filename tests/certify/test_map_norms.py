"""Norms of convolutions as maps: upper bounds always, and close where they claim to be."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from certify_attacks import power_iteration
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lrmanifold import linalg
from lrmanifold.nn import LowRankConv2d

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def dense_matrix(layer, size) -> torch.Tensor:
    n = layer.in_channels * math.prod(size)
    units = torch.eye(n, dtype=layer.weight.dtype, device=layer.weight.device)
    return layer(units.view(n, layer.in_channels, *size)).flatten(1).T.detach()


def arguments(layer) -> dict:
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names}


@st.composite
def convolutions(draw):
    d = draw(st.sampled_from((1, 2, 2, 3)))
    k = draw(st.integers(1, 4 if d < 3 else 2))
    mode = draw(st.sampled_from(("zeros", "zeros", "circular", "reflect", "replicate")))
    if d == 3 and mode == "reflect":
        mode = "circular"
    groups = draw(st.sampled_from((1, 1, 2)))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = draw(st.sampled_from((0, 1, 2)))
    if stride == 1 and draw(st.booleans()):
        padding = draw(st.sampled_from(("same", "valid")))
    torch.manual_seed(draw(st.integers(0, 1000)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch pads once more for even kernels and "same"
        layer = CLASSES[d](
            4, 6, k, stride, padding, dilation, groups, bias=False, padding_mode=mode
        ).double()
    if draw(st.booleans()):  # all of one sign: the largest gap between the matrix and the map
        with torch.no_grad():
            layer.weight.abs_()
    low = dilation * (k - 1) + 1 if mode != "reflect" else max(3, dilation * (k - 1) + 1)
    size = tuple(draw(st.integers(max(low, 3), max(low, 3) + 3)) for _ in range(d))
    return layer, size


@given(convolutions(), st.booleans())
def test_every_bound_is_above_the_norm_of_the_dense_matrix(case, sized):
    layer, size = case
    true = float(torch.linalg.matrix_norm(dense_matrix(layer, size), 2))
    try:
        bound = float(
            linalg.convolution_norm(
                layer.weight, input_size=size if sized else None, **arguments(layer)
            )
        )
    except ValueError:
        # with the size given there is always a bound
        assert not sized
        assert layer.padding_mode == "circular"
        return
    assert bound >= true
    taps = math.prod(layer.kernel_size)
    copies = 9.0 if layer.padding_mode in ("reflect", "replicate") else 2.0
    assert bound <= true * math.sqrt(taps) * copies + 1e-12
    # what training uses is the same number without the rounding
    estimate = linalg.convolution_norm_estimate(
        layer.weight, input_size=size if sized else None, iterations=12, **arguments(layer)
    )
    assert float(estimate.detach()) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("size", [(6, 8), (9, 9)])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (1, 5), (3, 3), (2, 2)])
def test_circular_padding_is_exact_against_the_dense_matrix(size, stride, kernel, device):
    if stride > 1 and (size[0] % stride or size[1] % stride):
        pytest.skip("a stride that does not divide the image has a bound only")
    layer = nn.Conv2d(
        3, 5, kernel, stride, (kernel - 1) // 2, bias=False, padding_mode="circular"
    ).to(device, torch.float64)
    s = torch.linalg.svdvals(dense_matrix(layer, size).cpu())  # LAPACK's, to the last digits
    options = {"input_size": size, **arguments(layer)}
    bound = float(linalg.convolution_norm(layer.weight, iterations=24, **options))
    assert 1.0 <= bound / float(s[0]) <= 1.0 + 1e-6
    if stride == 1:
        low, high = linalg.convolution_singular_range(layer.weight, **options)
        rows = min(5, 3) * math.prod(size)
        assert high == pytest.approx(float(s[0]), rel=1e-9)
        assert low == pytest.approx(float(s[:rows].min()), rel=1e-9)


@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("dilation", [1, 2])
def test_six_gram_iterations_are_within_five_percent(channels, dilation, device):
    torch.manual_seed(3)
    layer = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
    layer = layer.to(device, torch.float64)
    x = torch.zeros(1, channels, 12, 12, dtype=torch.float64, device=device)
    below = power_iteration(layer, x, 150)
    options = {"input_size": (12, 12), **arguments(layer)}
    bound = float(linalg.convolution_norm(layer.weight, iterations=6, **options))
    assert 1.0 <= bound / below <= 1.05 + (0.05 if dilation == 2 else 0.0)


def test_patches_that_do_not_overlap_cost_nothing(device):
    layer = nn.Conv2d(3, 16, 4, 4, bias=False).to(device, torch.float64)
    true = float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))
    bound = float(linalg.convolution_norm(layer.weight, stride=4))
    assert 1.0 <= bound / true <= 1.0 + 1e-8
    assert float(torch.linalg.matrix_norm(dense_matrix(layer, (8, 8)), 2)) <= bound


def test_the_norm_of_the_matrix_is_no_bound_of_the_map():
    # the counterexample that makes this file necessary: all ones, three times as large
    kernel = torch.ones(1, 1, 3, 3, dtype=torch.float64) / 3.0
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(kernel)
    true = float(torch.linalg.matrix_norm(dense_matrix(layer, (16, 16)), 2))
    assert float(torch.linalg.matrix_norm(kernel.flatten(1), 2)) == pytest.approx(1.0)
    assert true > 2.9
    assert true <= float(linalg.convolution_norm(kernel, input_size=(16, 16), padding=1)) < 3.01


def test_unknown_sizes_are_bounded_for_every_size():
    torch.manual_seed(0)
    layer = nn.Conv1d(3, 3, 4, padding=3, bias=False).double()
    bound = float(linalg.convolution_norm(layer.weight, padding=3))
    norms = [float(torch.linalg.matrix_norm(dense_matrix(layer, (n,)), 2)) for n in (4, 9, 30, 90)]
    assert max(norms) <= bound <= 1.02 * max(norms)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(norms))


@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(0, 1000),
    st.sampled_from((1e-200, 1e-3, 1.0, 1e200)),
    st.booleans(),
)
def test_spectral_norm_bound_is_above_and_close(m, n, seed, size, equal):
    torch.manual_seed(seed)
    A = torch.randn(m, n, dtype=torch.float64)
    if equal:  # all singular values equal: the slowest case of the iteration
        U, _, Vh = torch.linalg.svd(A, full_matrices=False)
        A = U @ Vh
    true = float(torch.linalg.matrix_norm(A, 2))
    bound = float(linalg.spectral_norm_bound(A * size)) / size
    # float64's own SVD is right to a few roundings only
    assert 1.0 - 1e-14 * max(m, n) <= bound / true <= 1.0 + 1e-8


def test_spectral_norm_bound_is_above_what_exact_arithmetic_gives():
    # ‖A‖² of integers: an eigenvalue that is known exactly
    A = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert float(linalg.spectral_norm_bound(A)) >= 5.0
    ones = torch.ones(7, 5, dtype=torch.float64)
    assert float(linalg.spectral_norm_bound(ones)) ** 2 >= 35.0
    assert torch.isnan(linalg.spectral_norm_bound(torch.full((2, 2), torch.nan)))
    assert float(linalg.spectral_norm_bound(torch.zeros(3, 4))) == 0.0


def test_gram_norm_has_the_gradient_of_the_spectral_norm():
    torch.manual_seed(0)
    A = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    linalg.gram_norm(A, iterations=12).backward()
    U, _, Vh = torch.linalg.svd(A.detach())
    assert torch.allclose(A.grad, torch.outer(U[:, 0], Vh[0]), atol=1e-3)


def test_defects_of_frames_are_measured(device):
    Q = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64, device=device)).Q
    assert float(linalg.orthonormality_defect_bound(Q)) < 1e-12
    longer = Q.clone()
    longer[:, 0] *= 1.0 + 1e-5
    defect = float(linalg.orthonormality_defect_bound(longer))
    assert 2e-5 <= defect <= 2.1e-5
    assert math.sqrt(1 + defect) >= float(torch.linalg.matrix_norm(longer, 2))


def test_a_low_rank_convolution_is_measured_by_its_filters(device):
    layer = LowRankConv2d(6, 8, 3, 4, padding=1, bias=False, tau=0.0, dtype=torch.float64)
    layer = layer.to(device)
    _, S, V = layer.factors
    kernel = layer.dense_weight()
    options = {"input_size": (7, 7), "padding": 1}
    whole = float(linalg.convolution_norm(kernel, **options))
    rows = (S @ V.mT).reshape(4, 3, 3, 6).movedim(-1, 1)
    assert float(linalg.convolution_norm(rows, **options)) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"padding_mode": "mirror"}, "padding_mode"),
        ({"stride": 0}, "stride"),
        ({"groups": 4}, "groups"),
        ({"padding": "full"}, "padding"),
        ({"input_size": (3,)}, "input_size"),
        ({"padding_mode": "circular", "padding": 1, "stride": 2}, "input_size"),
        ({"input_size": (2, 2)}, "kernel reaches"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        linalg.convolution_norm(torch.ones(6, 2, 3, 3), **change)


@pytest.mark.parametrize(
    "function",
    [
        linalg.convolution_norm,
        linalg.convolution_norm_estimate,
        linalg.convolution_singular_range,
    ],
)
def test_complex_kernels_are_refused(function):
    with pytest.raises(TypeError, match=r"kernel must be a real .*complex64"):
        function(torch.ones(6, 2, 3, 3, dtype=torch.complex64))


def line(kernel, size, **options):
    """The true norm of a convolution of one dimension, and its bound."""
    layer = nn.Conv1d(1, 1, len(kernel), bias=False, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(kernel, dtype=torch.float64))
    return layer, float(torch.linalg.matrix_norm(dense_matrix(layer, (size,)), 2))


def test_zero_padding_needs_room_for_the_kernel():
    # differences on three pixels: a circle of three does not know the largest of them
    layer, true = line([1.0, -1.0], 3, padding=1)
    assert true == pytest.approx(2 * math.cos(math.pi / 8))
    on_three = 2 * math.cos(math.pi / 6)
    assert (
        on_three < true <= float(linalg.convolution_norm(layer.weight, input_size=(3,), padding=1))
    )


def test_a_grid_of_frequencies_is_enlarged_to_bound_those_between():
    # a wave that is largest half way between two of 32 frequencies
    turn = 2 * math.pi * 7.48 / 32
    wave = [math.cos(turn * (t - 1.5)) for t in range(4)]
    layer, true = line(wave, 600)
    spectrum = torch.fft.fft(layer.weight.detach().flatten(), 32).abs().max()
    assert float(spectrum) < true * 0.999
    assert true <= float(linalg.convolution_norm(layer.weight)) < 1.03 * true
    assert true <= float(linalg.convolution_norm(layer.weight, input_size=(600,))) < 1.03 * true


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_pixels_that_padding_copies_are_counted(mode):
    layer, true = line([1.0, 1.0, 1.0], 3, padding=2, padding_mode=mode)
    assert true > 3.0  # more than the sum of the kernel, which no zero padding exceeds
    bound = linalg.convolution_norm(layer.weight, input_size=(3,), padding=2, padding_mode=mode)
    assert true <= float(bound) <= 2 * true
