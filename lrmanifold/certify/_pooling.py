"""Bounds of pooling, padding and upsampling: how many windows may hold one pixel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .. import linalg
from .bounds import Bound, BoundError, Context, bounded

_UP = 1.0 + 1e-14


def _tuple(value: Any, d: int) -> tuple[int, ...]:
    several = (value,) if isinstance(value, int) else tuple(value)
    return several * d if len(several) == 1 else several


def _dims(module: nn.Module) -> int:
    # of torch's own class: a subclass may have any name
    named = next(c for c in type(module).__mro__ if c.__module__ == "torch.nn.modules.pooling")
    return int(named.__name__[-2])


@bounded(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
def _max_pool(module: Any, context: Context) -> Bound:
    """A maximum changes by at most the largest change in its window; each pixel counts once in
    every window that holds it."""
    stride = module.kernel_size if module.stride is None else module.stride
    d = _dims(module)
    many = linalg.overlaps(
        _tuple(module.kernel_size, d), _tuple(stride, d), _tuple(module.dilation, d), d
    )
    if module.return_indices:
        raise BoundError(f"{context.name} (MaxPool): return_indices=True gives two outputs")
    return Bound(math.sqrt(many) * _UP, f"a pixel is in {many} windows", slope=0.0)


@bounded(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def _avg_pool(module: Any, context: Context) -> Bound:
    """Schur's test a dimension: rows sum to 1, columns to at most ⌈k/s⌉ of 1/k."""
    d = _dims(module)
    k = _tuple(module.kernel_size, d)
    stride = k if module.stride is None else _tuple(module.stride, d)
    pad = _tuple(module.padding, d)
    if module.ceil_mode:
        raise BoundError(
            f"{context.name} (AvgPool): windows cut by ceil_mode=True divide by fewer pixels than "
            "is known here; use ceil_mode=False"
        )
    square = 1.0
    sizes = (0,) * d if context.input_shape is None else context.input_shape[-d:]
    for n, s, p, size in zip(k, stride, pad, sizes, strict=True):
        fewest = n
        if not module.count_include_pad:
            # a window divides by the pixels in it: beyond one edge of the image, or beyond both
            fewest = max(1, min(n - p, size or n - 2 * p))
        square *= math.ceil(n / s) / fewest
    if getattr(module, "divisor_override", None):
        square *= (math.prod(k) / module.divisor_override) ** 2
    norm = math.sqrt(square) * _UP
    return Bound(norm, "row and column sums", slope=4.1 * (math.prod(k) + 8) * max(1.0, norm))


def _windows(n: int, out: int) -> torch.Tensor:
    """Adaptive pooling of one dimension as a 0-1 matrix (out, n)."""
    places = torch.zeros(out, n, dtype=torch.float64, device="cpu")
    for i in range(out):
        places[i, (i * n) // out : -((-(i + 1) * n) // out)] = 1.0
    return places


def _adaptive(module: Any, context: Context) -> list[torch.Tensor]:
    d = _dims(module)
    sizes = context.need_shape("adaptive pooling needs the size of the images")[-d:]
    out = _tuple(module.output_size, d) if module.output_size is not None else (None,) * d
    return [_windows(n, n if want is None else want) for n, want in zip(sizes, out, strict=True)]


@bounded(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_avg(module: Any, context: Context) -> Bound:
    if module.output_size in (1, (1, 1), (1, 1, 1)) and context.input_shape is None:
        return Bound(1.0, "mean of at least one pixel", slope=64.0)
    norm, inner = 1.0, 1
    for places in _adaptive(module, context):
        means = places / places.sum(1, keepdim=True)
        norm *= float(linalg.spectral_norm_bound(means)) * _UP
        inner *= int(places.sum(1).max())
    return Bound(norm, "norm of the averages", slope=4.1 * (inner + 8) * max(1.0, norm))


@bounded(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
def _adaptive_max(module: Any, context: Context) -> Bound:
    if module.return_indices:
        raise BoundError(f"{context.name} (MaxPool): return_indices=True gives two outputs")
    many = math.prod(int(places.sum(0).max()) for places in _adaptive(module, context))
    return Bound(math.sqrt(many) * _UP, f"a pixel is in {many} windows", slope=0.0)


@bounded(
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
)
def _constant_pad(module: Any, context: Context) -> Bound:
    return Bound(1.0, "constants around the image", slope=0.0)


@bounded(
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
)
def _copying_pad(module: Any, context: Context) -> Bound:
    """Each pixel becomes itself and its copies: √ of how many."""
    return _copied(module, context)


@bounded(nn.Upsample, nn.UpsamplingNearest2d)
def _upsample(module: Any, context: Context) -> Bound:
    if module.mode != "nearest":
        raise BoundError(
            f"{context.name} (Upsample): mode {module.mode!r} has no bound here; use 'nearest', or "
            "a transposed convolution"
        )
    return _copied(module, context)


def _copied(module: nn.Module, context: Context) -> Bound:
    """Count on an image of pixel numbers how often each occurs in the output."""
    shape = context.need_shape("it copies pixels, how often depends on the size")
    # torch takes a sample without channels, too
    d = len(getattr(module, "padding", shape[1:] * 2)) // 2
    size = shape[-d:]
    numbers = torch.arange(math.prod(size), dtype=torch.float64, device="cpu").view(1, 1, *size)
    try:
        with torch.no_grad():
            copies = torch.bincount(module(numbers).long().flatten())
    except RuntimeError as error:
        raise BoundError(
            f"{context.name or 'the model'} ({type(module).__name__}) does not take an image of "
            f"{tuple(size)}: {str(error).splitlines()[0]}"
        ) from error
    many = max(copies.tolist(), default=0)
    return Bound(math.sqrt(many) * _UP, f"a pixel has up to {many} copies", slope=0.0)
