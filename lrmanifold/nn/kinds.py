"""The kinds of dense layers that can become low-rank, and the matrix that each of them holds."""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import Tensor, nn

from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .conv_transpose import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d
from .embedding import LowRankEmbedding
from .linear import LowRankLinear
from .transposed import LowRankTransposedLinear, conv1d_of_transformers

LAYERS: dict[type[nn.Module], Any] = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
    nn.ConvTranspose1d: LowRankConvTranspose1d,
    nn.ConvTranspose2d: LowRankConvTranspose2d,
    nn.ConvTranspose3d: LowRankConvTranspose3d,
    nn.Embedding: LowRankEmbedding,
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def kinds() -> dict[type[nn.Module], Any]:
    """Dense classes and their low-rank ones; transformers' Conv1D where it has been imported."""
    theirs = conv1d_of_transformers(sys.modules)
    return LAYERS if theirs is None else {**LAYERS, theirs: LowRankTransposedLinear}


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The class among :func:`kinds` that `module` is an instance of; None if there is none."""
    return next((kind for kind in kinds() if isinstance(module, kind)), None)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight has the inputs first and the outputs after them."""
    return isinstance(module, _TRANSPOSED) or kinds().get(type(module)) is LowRankTransposedLinear


def matrix_of(module: nn.Module) -> tuple[tuple[int, int], int]:
    """Shape (m, n) of the matricised weight of each group, and the number of groups."""
    weight: Any = module.weight
    groups = getattr(module, "groups", 1)
    first, rest = weight.shape[0] // groups, math.prod(weight.shape[1:])
    return ((rest, first) if is_transposed(module) else (first, rest)), groups


def matrices_of(module: nn.Module) -> Tensor:
    """The matricised weight, shape (groups, m, n), up to an order of rows and of columns."""
    weight: Any = module.weight
    groups = getattr(module, "groups", 1)
    blocks = weight.reshape(groups, weight.shape[0] // groups, -1)
    return blocks.mT if is_transposed(module) else blocks


def weight_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The weight; of a pruned, normalised or parametrized layer what it is made of."""
    weight = module._parameters.get("weight")
    if weight is not None:
        return [weight]
    made_of = ("parametrizations.weight", "weight_orig", "weight_g", "weight_v")
    return [p for name, p in module.named_parameters() if name.startswith(made_of)]


def is_quantized(module: nn.Module) -> bool:
    """Whether it is one of torch's quantized layers, whose weight is a method."""
    weight = getattr(module, "weight", None)
    return callable(weight) and not isinstance(weight, nn.Module)
