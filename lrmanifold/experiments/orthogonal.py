"""Networks with orthogonal matrices by torch's parametrisation: the full-rank rival."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from .. import linalg

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
        self.bias, self.shape = conv.bias, conv.weight.shape
        matrix = nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=False)
        matrix.weight = nn.Parameter(conv.weight.detach().flatten(1))
        self.matrix: Any = orthogonal(matrix, orthogonal_map=MAP)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with the matrix in the kernel's shape."""
        kernel = self.matrix.weight.reshape(self.shape)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation)


def orthogonalize(network: nn.Module) -> nn.Module:
    """All linear and 2-d convolution layers but the last, in place, start at the nearest matrices.

    The last stays free: a norm of 1 there would bound the logits.
    """
    names = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for name in names[:-1]:
        parent, _, child = name.rpartition(".")
        owner = network.get_submodule(parent)
        layer: Any = getattr(owner, child)
        with torch.no_grad():
            matrix = layer.weight.flatten(1)
            tall = len(matrix) >= matrix.shape[1]
            nearest = linalg.polar(matrix) if tall else linalg.polar(matrix.mT).mT
            layer.weight.copy_(nearest.reshape(layer.weight.shape))
        if isinstance(layer, nn.Conv2d):
            setattr(owner, child, OrthogonalConv2d(layer))
        else:
            orthogonal(layer, orthogonal_map=MAP)
    return network
