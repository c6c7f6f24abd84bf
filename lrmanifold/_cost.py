"""What a batch means for the cost of a training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._evaluation import evaluation_mode
from .nn import LowRankLayer
from .nn.plan import LAYERS

#: Matrix products run fastest at ranks that are multiples of this.
RANK_MULTIPLE = 16


def effective_batch(model: nn.Module, example: Any) -> dict[str, int]:
    """Rows that each layer's weight is multiplied with in one pass: batch x output positions.

    Parameters
    ----------
    model : nn.Module
        Run once, in evaluation mode and without gradients.
    example : Tensor, tuple or dict
        A batch: the input, the positional or the keyword arguments of `model`.

    Returns
    -------
    dict
        By qualified name; a layer that is used several times counts all its rows.
    """
    rows: dict[str, int] = {}
    handles = []
    kinds: tuple[type[nn.Module], ...] = (LowRankLayer, *LAYERS)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            size: Any = getattr(module, "out_features", None) or module.out_channels

            def count(_module: nn.Module, _args: Any, out: Tensor, name=name, size=size) -> None:
                rows[name] = rows.get(name, 0) + out.numel() // int(size)

            handles.append(module.register_forward_hook(count))
    try:
        with torch.no_grad(), evaluation_mode(model):
            if isinstance(example, dict):
                model(**example)
            else:
                model(*example) if isinstance(example, (tuple, list)) else model(example)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def better_rank(rank: int, limit: int) -> int | None:
    """The nearest multiple of 16 above a large rank that is none, if it fits; else None."""
    above = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
    near = rank >= 4 * RANK_MULTIPLE and 0 < above - rank <= RANK_MULTIPLE // 2
    return above if near and above <= limit else None
