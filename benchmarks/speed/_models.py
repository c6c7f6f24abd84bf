"""Networks of the benchmarks that :mod:`benchmarks.models` does not have."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ..character_model import Block


class Embedding(nn.Module):
    """Tokens and places: shape (N, T) to (N, T, width)."""

    def __init__(self, width: int, vocabulary: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the two."""
        return self.token(x) + self.place[: x.shape[1]]


def transformer(
    width: int, *, depth: int = 12, heads: int = 4, vocabulary: int = 256, context: int = 256
) -> nn.Sequential:
    """Causal language model on tokens (N, context): blocks of four linear layers, and ``fc``."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(embed=Embedding(width, vocabulary, context))
    for i in range(depth):
        layers[f"block{i}"] = Block(width, heads)
    layers["norm"] = nn.LayerNorm(width)
    layers["fc"] = nn.Linear(width, vocabulary)
    return nn.Sequential(layers)


def two_convolutions(channels: int = 8) -> nn.Sequential:
    """A tiny network for 8 x 8 images, for quick runs."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, channels, 3, padding=1),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(channels, 2 * channels, 3, padding=1),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            fc=nn.Linear(2 * channels, 10),
        )
    )
