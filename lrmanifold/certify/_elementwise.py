"""Bounds of activations, rearrangements and of what is refused by name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .._worst import worst
from ..nn import LowRankEmbedding, LowRankMultiheadAttention, MaxMin, Patchify
from .bounds import Bound, BoundError, Context, bounded

_SLOPE = "largest slope"


@bounded(
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    Patchify,
    MaxMin,
)
def _rearranged(module: nn.Module, context: Context) -> Bound:
    if isinstance(module, nn.Flatten) and module.start_dim == 0:
        raise BoundError(f"{context.name} (Flatten) joins samples: start_dim must not be 0")
    if isinstance(module, nn.Unflatten) and module.dim in (0, "N"):
        raise BoundError(f"{context.name} (Unflatten) splits the batch: dim must not be 0")
    start = getattr(module, "start_dim", getattr(module, "dim", 1))
    _check_dim(start, module, context)
    return Bound(1.0, "rearranges entries", slope=0.0)


def _check_dim(dim: object, module: nn.Module, context: Context) -> None:
    """A dimension counted from the end may be the batch: then the shape decides."""
    if not isinstance(dim, int) or dim > 0:
        return
    shape = context.need_shape("whether its dim is the batch depends on the dimensions") or ()
    if dim == 0 or len(shape) + 1 + dim <= 0:
        kind = type(module).__name__
        raise BoundError(f"{context.name} ({kind}): dim {dim} is the batch, so it mixes samples")


@bounded(
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
)
def _dropout(module: nn.Module, context: Context) -> Bound:
    return Bound(1.0, "the identity in evaluation mode", slope=0.0)


@bounded(nn.ReLU, nn.ReLU6, nn.Hardtanh)
def _clipped(module: nn.Module, context: Context) -> Bound:
    return Bound(1.0, _SLOPE, slope=0.0)


@bounded(nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Softshrink, nn.Tanhshrink)
def _one(module: nn.Module, context: Context) -> Bound:
    return Bound(1.0, _SLOPE, offset=_offset(context))


@bounded(nn.CELU)
def _celu(module: Any, context: Context) -> Bound:
    if not module.alpha > 0:
        raise BoundError(f"{context.name} (CELU): alpha must be positive, got {module.alpha}")
    return Bound(1.0, _SLOPE, offset=_offset(context, 16.0 * max(1.0, module.alpha)))


def _steepest(slope: float) -> Bound:
    """Of a function of two straight lines, rounded at the size of its output."""
    return Bound(slope, _SLOPE, slope=16.0 * slope)


def _offset(context: Context, size: float = 16.0) -> float:
    """Functions whose value is not small with x are rounded at their own size, a few at most."""
    if context.input_shape is None:
        return 0.0  # without shapes nothing is evaluated, so nothing is rounded
    return size * math.sqrt(math.prod(context.input_shape))


@bounded(nn.LeakyReLU)
def _leaky(module: Any, context: Context) -> Bound:
    return _steepest(worst((1.0, abs(module.negative_slope))))


@bounded(nn.RReLU)
def _rrelu(module: Any, context: Context) -> Bound:
    # evaluation mode takes the mean slope
    return _steepest(worst((1.0, (abs(module.lower) + abs(module.upper)) / 2 * (1 + 1e-15))))


@bounded(nn.PReLU)
def _prelu(module: Any, context: Context) -> Bound:
    steepest = module.weight.abs().amax().clamp_min(1.0)
    # in training an accelerator is not waited for
    return _steepest(float(steepest.detach())) if context.exact else Bound(steepest, _SLOPE)


@bounded(nn.ELU)
def _elu(module: Any, context: Context) -> Bound:
    largest = worst((1.0, abs(module.alpha)))
    return Bound(largest, _SLOPE, offset=_offset(context, 16.0 * largest))


@bounded(nn.SELU)
def _selu(module: Any, context: Context) -> Bound:
    return Bound(1.7580994, _SLOPE, offset=_offset(context))  # scale · alpha, at 0 from the left


@bounded(nn.Sigmoid)
def _sigmoid(module: Any, context: Context) -> Bound:
    return Bound(0.25, _SLOPE, offset=_offset(context))


@bounded(nn.Hardsigmoid)
def _hardsigmoid(module: Any, context: Context) -> Bound:
    # torch multiplies by the float32 number next to 1/6, in every dtype
    return Bound(0.1666666717, _SLOPE, offset=_offset(context))


@bounded(nn.Hardswish)
def _hardswish(module: Any, context: Context) -> Bound:
    return Bound(1.5, _SLOPE, offset=_offset(context))


@bounded(nn.SiLU)
def _silu(module: Any, context: Context) -> Bound:
    return Bound(1.0998394, _SLOPE, offset=_offset(context))


@bounded(nn.Mish)
def _mish(module: Any, context: Context) -> Bound:
    return Bound(1.0885700, _SLOPE, offset=_offset(context))


@bounded(nn.GELU)
def _gelu(module: Any, context: Context) -> Bound:
    # at √2: Φ(√2) + √2 φ(√2); the tanh form's largest slope is a little larger
    value = 1.1289046 if module.approximate == "none" else 1.1290
    return Bound(value, _SLOPE, offset=_offset(context))


@bounded(nn.Softplus)
def _softplus(module: Any, context: Context) -> Bound:
    if not module.beta > 0:
        raise BoundError(f"{context.name} (Softplus): beta must be positive, got {module.beta}")
    # torch switches to x above the threshold, by a jump
    jump = math.log1p(math.exp(-abs(module.threshold))) + max(-module.threshold, 0.0)
    jump /= module.beta
    if not jump <= 1e-6:
        raise BoundError(
            f"{context.name} (Softplus): jumps by {jump:.1e} at its threshold, so no constant "
            f"exists: use a larger one than {module.threshold:g}, such as 20"
        )
    # what is left, 2e-9 by default, counts as an error of the value in every radius
    size = 16.0 * max(1.0, 1.0 / module.beta) + 1.01 * jump * 2.0**53
    how = f"largest slope, but for a jump of {jump:.0e}"
    return Bound(1.0, how, offset=_offset(context, size), jump=jump)


@bounded(nn.Softmax, nn.Softmin)
def _softmax(module: Any, context: Context) -> Bound:
    if module.dim in (None, 0):
        raise BoundError(f"{context.name} (Softmax): give a dim other than 0, the batch")
    _check_dim(module.dim, module, context)
    # diag(p) - ppᵀ has row sums 2 p (1 - p) <= 1/2
    return Bound(0.5, "rows of the Jacobian", offset=_offset(context, 64.0))


_REFUSED = {
    "divides by the size of its own input, which may be near zero: use BatchNorm, fix the scale or "
    "leave it out": (
        nn.LayerNorm,
        nn.GroupNorm,
        nn.InstanceNorm1d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.LocalResponseNorm,
        nn.CrossMapLRN2d,
        nn.RMSNorm,
    ),
    "jumps, so no constant exists": (nn.Hardshrink, nn.Threshold),
    "multiplies functions of its input, so its constant grows with the input": (
        nn.GLU,
        nn.MultiheadAttention,
        LowRankMultiheadAttention,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
        nn.Transformer,
        nn.Bilinear,
    ),
}


def _refuse(reason: str) -> Any:
    def refuse(module: nn.Module, context: Context) -> Bound:
        kind = type(module).__name__
        raise BoundError(
            f"{context.name or 'the model'} ({kind}) has no global Lipschitz constant: it "
            f"{reason}; or register_bound({kind}, fn) if yours has one"
        )

    return refuse


@bounded(nn.Embedding, nn.EmbeddingBag, LowRankEmbedding)
def _table(module: nn.Module, context: Context) -> Bound:
    raise BoundError(
        f"{context.name or 'the model'} ({type(module).__name__}) takes integers, of which no l2 "
        "norm measures a change: certify the part of the model that comes after it, with the "
        "embedded vectors as input"
    )


for _reason, _types in _REFUSED.items():
    bounded(*_types)(_refuse(_reason))


def largest(value: torch.Tensor) -> float:
    """Largest absolute value; 0 of an empty tensor."""
    return float(value.detach().abs().amax()) if value.numel() else 0.0
