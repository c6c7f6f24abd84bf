"""Networks with batches to train on, as the benchmarks of whole training steps use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrmanifold.experiments.models import lenet5

from ..models import vgg16
from ._models import transformer, two_convolutions

CONTEXT = 256
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Problem:
    """A dense network, the ranks of its layers, and a batch.

    Attributes
    ----------
    build : callable
        Makes the dense network.
    batch : callable
        Makes inputs and labels.
    rank : float
        Share of min(m, n).
    exclude : str or None
        Layers that stay dense, as in :func:`lrmanifold.factorize`.
    images : bool
        Whether memory formats matter.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    rank: float
    exclude: str | None = None
    images: bool = True

    @property
    def formats(self) -> tuple[str, ...]:
        """Memory formats to try."""
        return tuple(FORMATS) if self.images else ("contiguous",)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy over the last dimension."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def lenet(rank: float, batch: int = 128) -> Problem:
    """LeNet5 on 28 x 28 images."""
    return Problem(
        lenet5,
        lambda: (torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,))),
        rank,
        "fc2",
    )


def vgg(rank: float, batch: int) -> Problem:
    """VGG16 with batch norm on 32 x 32 images."""
    return Problem(
        vgg16, lambda: (torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))), rank, "fc"
    )


def language(
    rank: float, tokens: int, *, width: int, depth: int = 12, context: int = CONTEXT
) -> Problem:
    """Transformer of `depth` blocks on `tokens` tokens, in sequences of `context`."""
    shape = (tokens // context, context)
    return Problem(
        lambda: transformer(width, depth=depth, heads=max(1, width // 64), context=context),
        lambda: (torch.randint(256, shape), torch.randint(256, shape)),
        rank,
        "fc",
        images=False,
    )


def problems(device: torch.device) -> dict[str, Problem]:
    """Those of the benchmarks; the transformer is 768 wide on a GPU and 256 on a CPU."""
    found: dict[str, Problem] = {}
    for rank in (0.2, 0.5):
        found[f"LeNet5 b128 {rank:.0%}"] = lenet(rank)
        for batch in (32, 128):
            found[f"VGG16 b{batch} {rank:.0%}"] = vgg(rank, batch)
    width = 768 if device.type == "cuda" else 256
    for rank, tokens in ((0.2, 2048), (0.5, 2048), (0.2, 16384)):
        found[f"transformer {width} of {tokens} tokens {rank:.0%}"] = language(
            rank, tokens, width=width
        )
    return found


def quick_problems() -> dict[str, Problem]:
    """Tiny ones of each kind."""
    return {
        "convolutions b2 20%": Problem(
            two_convolutions, lambda: (torch.randn(2, 3, 8, 8), torch.randint(10, (2,))), 0.2, "fc"
        ),
        "transformer 16 of 32 tokens 20%": language(0.2, 32, width=16, depth=1, context=16),
    }
