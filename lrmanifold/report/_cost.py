"""What a batch means for the cost of a training step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._evaluation import evaluation_mode
from ..nn import LowRankLayer
from ..nn.kinds import kinds

#: Matrix products run fastest at ranks that are multiples of this.
RANK_MULTIPLE = 16


# Under these names layers keep the length of an output row.
_OUTPUTS = ("out_features", "out_channels", "embedding_dim", "nf")


class Passed(NamedTuple):
    """What went through a layer in one pass."""

    rows: int  # vectors that its weight was multiplied with: batch x output positions
    image: tuple[int, ...] | None  # size of a convolution's input, if it was always the same


def passed(model: nn.Module, example: Any) -> dict[str, Passed]:
    """Rows that each layer's weight is multiplied with in one pass, and the size of its images.

    Parameters
    ----------
    model : nn.Module
        Run once, in evaluation mode and without gradients.
    example : Tensor, tuple or dict
        A batch: the input, the positional or the keyword arguments of `model`.

    Returns
    -------
    dict of Passed
        By qualified name; a layer that is used several times counts all its rows.
    """
    found: dict[str, Passed] = {}
    handles = []
    known: tuple[type[nn.Module], ...] = (LowRankLayer, *kinds())
    for name, module in model.named_modules():
        if isinstance(module, known):
            sizes = (getattr(module, key, None) for key in _OUTPUTS)
            size: Any = next(n for n in sizes if n is not None)

            def count(module: nn.Module, args: Any, out: Tensor, name=name, size=size) -> None:
                dims = len(getattr(module, "kernel_size", ()))
                image = tuple(args[0].shape[-dims:]) if dims and args else None
                before = found.get(name, Passed(0, image))
                same = image if before.image == image else None
                found[name] = Passed(before.rows + out.numel() // int(size), same)

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
    return found


def better_rank(rank: int, limit: int) -> int | None:
    """The nearest multiple of 16 above a large rank that is none, if it fits; else None."""
    above = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
    near = rank >= 4 * RANK_MULTIPLE and 0 < above - rank <= RANK_MULTIPLE // 2
    return above if near and above <= limit else None
