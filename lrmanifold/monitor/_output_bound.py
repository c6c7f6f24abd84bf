"""Theorem T3: how far the outputs of two networks of one shape can be apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from .. import linalg
from ..nn import LowRankLayer

# With Lipschitz constant 1 in the Euclidean norm. LeakyReLU is looked at: its slope is free.
_LIPSCHITZ_1 = (
    nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Softplus, nn.Hardtanh, nn.LogSigmoid,
    nn.Softsign, nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Softshrink, nn.Hardshrink,
)  # fmt: skip
_NOT_1 = (nn.Hardshrink,)  # jumps


@torch.no_grad()
def output_bound(
    model: nn.Module, reference: nn.Module, x: Tensor, distance: float | None
) -> Tensor:
    """Bound on ‖f_Y(x) - f_W(x)‖ for each input, see ``Monitor.output_bound``.

    With `distance`, all parameters together may differ by that much: Σ a_i δ_i over Σ δ_i² <=
    distance² is at most distance · sqrt(Σ a_i²).
    """
    x = x.detach().cpu().double().clone()  # layers may write in place
    known = torch.zeros(len(x), dtype=torch.float64)  # with measured changes of the layers
    squares = torch.zeros_like(known)  # Σ a_i², for a joint distance
    for ours, theirs in zip(_chain(model), _chain(reference), strict=True):
        z = _exactly(theirs, x)
        if isinstance(theirs, (nn.Linear, _ConvNd)):
            patches = _patches(theirs, x.shape[2:], z.shape[2:])
            lipschitz = _norm_of_map(theirs, ours, x.shape[2:])
            # A bias acts at every pixel, or at every place of a sequence.
            places = 0 if theirs.bias is None else z[0].numel() // theirs.bias.numel()
            if distance is None:
                known = lipschitz * known + (_exactly(ours, x) - z).flatten(1).norm(dim=1)
            reached = (patches * x.flatten(1).norm(dim=1)).square() + places
            squares = lipschitz**2 * squares + reached
        elif repr(ours) != repr(theirs):
            raise ValueError(
                f"output_bound needs models of the same layers, got {ours} and {theirs}"
            )
        x = z
    return known if distance is None else distance * squares.sqrt()


def _chain(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a chain in order; anything else is refused."""
    if type(module) is nn.Sequential:
        for part in module:
            yield from _chain(part)
        return
    _check_known(module)
    yield module


def _check_known(module: nn.Module) -> None:
    linear = isinstance(module, (LowRankLayer, nn.Linear, _ConvNd))
    fine = linear or (isinstance(module, _LIPSCHITZ_1) and not isinstance(module, _NOT_1))
    if isinstance(module, nn.LeakyReLU):
        fine = abs(module.negative_slope) <= 1.0
    if isinstance(module, nn.ELU):
        fine = abs(module.alpha) <= 1.0
    if isinstance(module, nn.Dropout):
        fine = not module.training or module.p == 0.0
    if isinstance(module, nn.Softplus):
        fine = module.beta >= 1.0 and module.threshold >= 20.0  # it jumps at its threshold
    if isinstance(module, (_MaxPoolNd, _AvgPoolNd)):
        sizes: tuple[Any, Any, Any] = (
            module.kernel_size, module.stride, getattr(module, "dilation", 1),
        )  # fmt: skip
        # Disjoint windows: a pixel is in one of them at most.
        kernel, stride, dilation = map(_tuple, sizes)
        pairs = zip(kernel, stride * (len(kernel) // len(stride)), strict=True)
        fine = all(k <= s for k, s in pairs) and set(dilation) == {1}
        fine = fine and getattr(module, "divisor_override", None) is None
    home = type(module).forward.__module__
    fine = fine and home.startswith(("torch.nn.modules.", "lrmanifold.nn."))  # not a subclass's own
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    if own or not fine:
        raise ValueError(
            "output_bound needs a chain (nn.Sequential) of linear and convolutional layers, "
            "activations with Lipschitz constant 1, pooling over disjoint windows and dropout in "
            f"evaluation mode, without hooks or forwards of their own, got {module}"
        )


def _tuple(x: int | tuple[int, ...]) -> tuple[int, ...]:
    return x if isinstance(x, tuple) else (x,)


def _norm_of_map(layer: nn.Module, ours: Any, size: torch.Size) -> float:
    """Upper bound of the norm of our layer as a map on images of that size."""
    low_rank = isinstance(ours, LowRankLayer)
    weight = (ours.dense_weight() if low_rank else ours.weight).detach().double().cpu()
    if not isinstance(layer, _ConvNd):
        return float(linalg.svdvals(weight)[..., 0].max())
    padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
    return float(
        linalg.convolution_norm(
            weight, input_size=tuple(size), stride=tuple(layer.stride), padding=padding,
            dilation=tuple(layer.dilation), groups=layer.groups, padding_mode=layer.padding_mode,
        )
    )  # fmt: skip


def _patches(layer: nn.Module, size: torch.Size, out: torch.Size) -> float:
    """Root of the number of patches that hold a pixel, times itself: ‖map‖ <= this ‖K‖₂."""
    if not isinstance(layer, _ConvNd):
        return 1.0
    if layer.padding_mode not in ("zeros", "circular") or layer.transposed:
        raise ValueError(
            "output_bound needs convolutions with zero or circular padding, got "
            f"padding_mode={layer.padding_mode!r}, transposed={layer.transposed}"
        )
    product = 1.0
    axes = zip(layer.kernel_size, layer.stride, layer.dilation, size, out, strict=True)
    for k, s, dilation, n, places in axes:
        # A pixel is in ceil(k/s) patches along an axis; with gaps, in k at most.
        product *= math.ceil(k / s) if dilation == 1 and layer.padding_mode == "zeros" else k
        if layer.padding_mode == "circular":  # wider than the kernel, patches come again
            product *= math.ceil(places * math.gcd(n, s) / n)
    return math.sqrt(product)


def _exactly(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output in float64, by a copy of it."""

    return copy.deepcopy(layer).cpu().double()(x)
