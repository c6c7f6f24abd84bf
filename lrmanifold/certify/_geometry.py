"""How a convolution reads an image: strides, padding, and how often it uses a pixel."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .bounds import BoundError, Context


def geometry_of(module: Any, context: Context) -> dict[str, Any]:
    """The arguments of :func:`lrmanifold.linalg.convolution_norm` beside the kernel."""
    d = len(module.kernel_size)
    if context.input_shape is not None and len(context.input_shape) != d + 1:
        raise BoundError(
            f"{context.name or 'the model'}: one image must have channels and {d} dimensions, got "
            f"{tuple(context.input_shape)}; input_shape is the shape of one sample, without the "
            "batch, such as (3, 32, 32)"
        )
    for key in ("stride", "padding", "dilation"):
        if isinstance(value := getattr(module, key), int):
            raise BoundError(
                f"{context.name or 'the model'}: its {key} was changed to {value} after it was "
                f"made: give one number a dimension, {(value,) * d}"
            )
    if module.padding_mode != "zeros":
        _check_pads(module, context)
    return {
        "input_size": None if context.input_shape is None else context.input_shape[-d:],
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "padding_mode": module.padding_mode,
    }


def _check_pads(module: Any, context: Context) -> None:
    """But for zeros a layer pads by numbers that it has worked out once, when it was made."""
    kept = getattr(module, "_pad", None) or module._reversed_padding_repeated_twice
    if list(kept) != _pads(module):
        raise BoundError(
            f"{context.name}: its padding was changed to {module.padding} after it was made, but "
            f"with padding_mode={module.padding_mode!r} it pads by {list(kept)}: make a new layer"
        )


def _pads(module: Any) -> list[int]:
    """Pixels before and after, the last dimension first, as torch works them out anew."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(module.kernel_size) - 1]
    anew = kind(
        1,
        1,
        module.kernel_size,
        padding=module.padding,
        dilation=module.dilation,
        padding_mode=module.padding_mode,
        device="meta",
    )
    return list(anew._reversed_padding_repeated_twice)


def uses(module: Any) -> int:
    """How often a convolution may use one pixel, with the copies of it that padding makes."""
    taps = math.prod(module.kernel_size)
    if module.padding_mode == "zeros":
        return taps
    around = _pads(module)
    pairs = zip(around[::2], around[1::2], strict=True)
    return taps * math.prod(1 + a + b for a, b in pairs)
