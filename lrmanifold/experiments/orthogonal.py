"""Networks with orthogonal matrices by torch's parametrisation: the full-rank rival."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import is_parametrized

from .. import linalg
from .._arguments import check_module
from ..nn.exchange import exchanged

MAP = "cayley"  # at 256 x 256 ten times faster than the default, the matrix exponential


class OrthogonalConv2d(nn.Module):
    """A convolution whose kernel, as a matrix, is orthogonal.

    torch's own parametrisation takes a kernel for a batch of k x k matrices, which is something
    else.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels, self.kernel_size, self.groups = conv.in_channels, conv.kernel_size, 1
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.padding_mode, self.around = conv.padding_mode, _around(conv)
        self.bias, self.shape = conv.bias, conv.weight.shape
        matrix = nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=False)
        matrix.weight = nn.Parameter(
            conv.weight.detach().flatten(1), requires_grad=conv.weight.requires_grad
        )
        self.matrix: Any = orthogonal(matrix, orthogonal_map=MAP)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with the matrix in the kernel's shape."""
        kernel = self.matrix.weight.reshape(self.shape)
        if self.padding_mode != "zeros":
            return F.conv2d(
                F.pad(x, self.around, self.padding_mode),
                kernel,
                self.bias,
                self.stride,
                0,
                self.dilation,
            )
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation)


def _around(conv: nn.Conv2d) -> list[int]:
    """The padding as ``F.pad`` takes it: left, right, top, bottom."""
    sides: list[int] = []
    for k in (1, 0):
        if conv.padding == "same":
            total = conv.dilation[k] * (conv.kernel_size[k] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += 2 * [0 if conv.padding == "valid" else int(conv.padding[k])]
    return sides


def orthogonalize(network: nn.Module) -> nn.Module:
    """All linear and 2-d convolution layers but the last, in place, start at the nearest matrices.

    The last stays free: a norm of 1 there would bound the logits.

    Raises
    ------
    TypeError
        If `network` is no module.
    ValueError
        Before anything changes: if there are fewer than two such layers, for convolutions with
        groups, and for weights that are shared, parametrized, or not there yet.
    """
    check_module("network", network)
    layers = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    if len(layers) < 2:
        raise ValueError(
            "network must have two linear or 2-d convolution layers or more, as the last stays "
            f"free, got {len(layers)}"
        )
    *names, _ = layers
    seen: dict[int, str] = {}
    for name, layer in layers.items():
        wrong = _unfit(layer) if name in names else ""
        first = seen.setdefault(id(layer._parameters.get("weight", layer)), name)
        wrong = f"with the weight of {first!r}" if first != name else wrong
        if wrong:
            raise ValueError(f"layer {name!r} cannot be made orthogonal: it is one {wrong}")
    new: dict[int, nn.Module] = {}
    for name in names:
        chosen: Any = layers[name]
        with torch.no_grad():
            matrix = chosen.weight.flatten(1)
            tall = len(matrix) >= matrix.shape[1]
            nearest = linalg.polar(matrix) if tall else linalg.polar(matrix.mT).mT
            chosen.weight.copy_(nearest.reshape(chosen.weight.shape))
        if isinstance(chosen, nn.Conv2d):
            new[id(chosen)] = OrthogonalConv2d(chosen)
        else:
            orthogonal(chosen, orthogonal_map=MAP)
    return exchanged(network, new)


def plain_layers(network: nn.Module) -> nn.Module:
    """Ordinary layers, in place, for the orthogonal ones, with copies of their matrices.

    The same function without the map from coordinates to matrices. torch's
    ``remove_parametrizations`` would spoil all copies of a network, as they share their classes.
    """
    new: dict[int, nn.Module] = {}
    for layer in check_module("network", network).modules():
        plain: Any
        if isinstance(layer, OrthogonalConv2d):
            weight = layer.matrix.weight.reshape(layer.shape)
            options = {
                key: getattr(layer, key)
                for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
            }
            size = (layer.in_channels, layer.shape[0])
            plain = skip_init(nn.Conv2d, *size, bias=False, **options)
        elif isinstance(layer, nn.Linear) and is_parametrized(layer, "weight"):
            weight = layer.weight
            plain = skip_init(nn.Linear, layer.in_features, layer.out_features, bias=False)
        else:
            continue
        plain.weight, plain.bias = nn.Parameter(weight.detach().clone()), layer.bias
        new[id(layer)] = plain.train(layer.training)
    return exchanged(network, new)


def _unfit(layer: nn.Module) -> str:
    """Why a layer's weight cannot become an orthogonal matrix; '' if it can."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return "whose weight is parametrized already"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "whose shape is not known yet: run the network once"
    return f"with {layer.groups} groups" if getattr(layer, "groups", 1) != 1 else ""
