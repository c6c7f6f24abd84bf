"""Bounds of linear layers, convolutions and batch norm: norms of the maps that they are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..nn import (
    ConvexPotential,
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankLayer,
    LowRankLinear,
    MeanOnlyBatchNorm,
)
from ._adapters import ADAPTERS, LOW_RANK, adapter_weight, bare, check_adapter, size_and_inner
from ._geometry import geometry_of, uses
from ._sizes import UP as _UP
from ._sizes import frobenius as _size
from .bounds import (
    Bound,
    BoundError,
    Context,
    bounded,
    computes_as,
    find_bound,
    module_bound,
    no_bound_words,
)

_SCALED_UP = 1.0 + 1e-11  # entries multiplied by a batch norm's scale: 8 u |K|, of the map |K|
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LOW_RANK_CONVOLUTIONS = (LowRankConv1d, LowRankConv2d, LowRankConv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
HEADS = (nn.Linear, *LOW_RANK, *ADAPTERS)


def linear_bound(module: Any, context: Context, scale: Tensor | None = None) -> Bound:
    """Bound of a linear layer or convolution, its outputs multiplied by `scale` a channel."""
    module = bare(module)
    if isinstance(module, LOW_RANK_CONVOLUTIONS):
        return _low_rank_convolution(module, context, scale)
    if isinstance(module, CONVOLUTIONS):
        return _convolution(module, context, scale)
    if isinstance(module, LowRankLinear):
        return _low_rank_linear(module, context, scale)
    return _dense(module, context, scale)


def can_scale(module: nn.Module) -> bool:
    """Whether :func:`linear_bound` takes it, so that a batch norm can be folded in."""
    return computes_as(bare(module), (*CONVOLUTIONS, *LOW_RANK_CONVOLUTIONS)) or is_head(module)


def is_head(module: nn.Module) -> bool:
    """Whether it multiplies by the matrix that :func:`dense_head` gives."""
    return computes_as(bare(module), HEADS)


def dense_head(module: Any) -> Tensor:
    """The weight (classes, n) of a last layer."""
    module = bare(module)
    if isinstance(module, LowRankLayer):
        return module.manifold.to_dense(module.weight)  # also where the dense one is transposed
    return adapter_weight(module) if isinstance(module, ADAPTERS) else module.weight


def head_error(module: Any) -> float:
    """Frobenius bound of the rounding in :func:`dense_head` of a float64 copy."""
    module = bare(module)
    if isinstance(module, LowRankLayer):
        X = module.manifold.unpack(module.weight.detach())
        size, inner = _size(X.U) * _size(X.S) * _size(X.V), 2 * X.S.shape[-1] + 8
    elif isinstance(module, ADAPTERS):
        size, inner = size_and_inner(module)
    else:
        return 0.0
    return linalg.rounding_of_products(inner) * size


@bounded(*HEADS)
def _linear(module: nn.Module, context: Context) -> Bound:
    base = bare(module)
    if base is not module and not is_head(base):
        # a resting adapter's base may be of any kind
        return module_bound(base, replace(context, name=f"{context.name}.base_layer"))
    return linear_bound(module, context)


@bounded(*CONVOLUTIONS, *LOW_RANK_CONVOLUTIONS)
def _any_convolution(module: nn.Module, context: Context) -> Bound:
    return linear_bound(module, context)


def _rounding(context: Context, inner: int, size: float, bias: Tensor | None, copies: int = 1):
    """Slope and offset of products of total inner dimension `inner` and Frobenius size `size`."""
    pixels = 1
    if bias is not None and context.output_shape is not None:
        pixels = max(1, math.prod(context.output_shape) // max(1, len(bias)))
    return {
        "slope": 4.1 * (inner + 8) * size * copies,
        "offset": 4.1 * _size(bias) * math.sqrt(pixels),
    }


def _dense(module: Any, context: Context, scale: Tensor | None) -> Bound:
    words, parts, inner = "spectral norm of the weight", 0.0, 0
    if isinstance(module, ADAPTERS):
        check_adapter(module, context)
        words = "spectral norm of the weight with its update"
        parts, inner = size_and_inner(module)
    W = dense_head(module)
    if scale is not None:
        W = scale[:, None] * W
    if not context.exact:
        return Bound(_power_iteration(W, context), "power iteration, a few steps from the last")
    if scale is not None:
        parts *= max(1.0, float(scale.detach().abs().amax()))
    error = linalg.rounding_of_products(inner) * parts + 16.0 * 2.0**-53 * _size(W)
    norm = float(linalg.spectral_norm_bound(W)) + error
    cond = _row_space_cond(linalg.svdvals(W.detach().double()), max(W.shape))
    size = max(_size(W), parts)
    return Bound(
        norm * _UP, words, cond, **_rounding(context, W.shape[1] + inner, size, module.bias)
    )


def _row_space_cond(s: Tensor, size: int) -> float:
    """Largest over smallest singular value that is more than rounding of the largest."""
    kept = s[s > 4.0 * size * 2.0**-53 * s[0]]
    return float(kept[0] / kept[-1]) if len(kept) else math.inf


def _power_iteration(W: Tensor, context: Context, steps: int = 3) -> Tensor:
    """uᵀ W v with u, v remembered: from below, so for training only."""
    with torch.no_grad():
        v = context.memory.get(context.name)
        alike = v is not None and (v.dtype, v.device) == (W.dtype, W.device)
        if v is None or not alike or v.shape[0] != W.shape[1]:
            generator = torch.Generator().manual_seed(0)
            v = torch.randn(W.shape[1], generator=generator, device="cpu").to(W)
            steps = 30
        for _ in range(steps):
            u = nn.functional.normalize(W @ v, dim=0)
            v = nn.functional.normalize(W.mT @ u, dim=0)
        context.remember(v)
        u = nn.functional.normalize(W @ v, dim=0)
    return u @ W @ v


def _frames(module: LowRankLayer) -> tuple[float, float]:
    """√(1 + δ) of U and V, δ the measured defect: how much longer than 1 a frame may be."""
    X = module.manifold.unpack(module.weight.detach().double())
    found = (float(linalg.orthonormality_defect_bound(Q).amax()) for Q in (X.U, X.V))
    first, second = (math.sqrt(1.0 + defect) * _UP for defect in found)
    return first, second


def _core_words(module: LowRankLayer, u: float, v: float) -> str:
    what = "α of the core" if module.tau == 0.0 else "σ_max of the core"
    return f"{what}, frames within {max(u * v - 1.0, 0.0):.0e}"


def _low_rank_linear(module: LowRankLinear, context: Context, scale: Tensor | None) -> Bound:
    if not context.exact:
        if scale is None:
            return Bound(module.sigma_max(), "core")
        X = module.factors
        return Bound(linalg.gram_norm(scale[:, None] * X.U @ X.S), "scaled core")
    X = module.manifold.unpack(module.weight.detach().double())
    u, v = _frames(module)
    size = _size(X.U) * _size(X.S) * _size(X.V)
    rounding = _rounding(context, X.V.shape[0] + 2 * X.S.shape[0], size, module.bias)
    s = linalg.svdvals(X.S)
    if scale is None:
        norm = float(linalg.spectral_norm_bound(X.S)) * u * v * _UP
        return Bound(norm, _core_words(module, u, v), float(s[0] / s[-1]), **rounding)
    scaled = scale[:, None] * X.U
    error = linalg.rounding_of_products(X.S.shape[0] + 2) * _size(scaled) * _size(X.S)
    norm = (float(linalg.spectral_norm_bound(scaled @ X.S)) + error) * v * _SCALED_UP
    rounding["slope"] *= max(1.0, float(scale.abs().amax()))
    return Bound(norm, "core with the batch norm folded in", **rounding)


def _map_norm(kernel: Tensor, context: Context, geometry: dict[str, Any]) -> Tensor:
    try:
        if not context.exact:
            return linalg.convolution_norm_estimate(kernel, **geometry)
        return linalg.convolution_norm(kernel, **geometry)
    except ValueError as error:
        raise BoundError(f"{context.name}: {error}") from error


def _map_cond(kernel: Tensor, geometry: dict[str, Any]) -> float | None:
    found = linalg.convolution_singular_range(kernel, **geometry)
    if found is None:
        return None
    least, largest = found
    # zero where the map loses more of the row space than its shape requires, but for rounding
    lost = least <= 4.0 * max(len(kernel), kernel[0].numel()) * 2.0**-53 * largest
    return math.inf if lost else largest / least


def _map_words(kernel_size: Any, geometry: dict[str, Any]) -> str:
    strides = geometry["stride"]
    separate = all(k <= s for k, s in zip(kernel_size, strides, strict=True))
    if separate:
        return "map on separate patches: its matrix"
    circular = geometry["padding_mode"] == "circular" and geometry["padding"] not in (0, "valid")
    return "map, all frequencies" if circular else "map, frequencies (Gram) or patches"


def _convolution(module: Any, context: Context, scale: Tensor | None) -> Bound:
    kernel, geometry = module.weight, geometry_of(module, context)
    if scale is not None:
        kernel = scale.view(-1, *[1] * (kernel.ndim - 1)) * kernel
    norm = _map_norm(kernel, context, geometry)
    if not context.exact:
        return Bound(norm, "map")
    taps = uses(module)
    return Bound(
        float(norm) * (_UP if scale is None else _SCALED_UP),
        _map_words(module.kernel_size, geometry),
        _map_cond(kernel, geometry),
        **_rounding(context, kernel[0].numel(), _size(kernel), module.bias, taps),
    )


def _filters(module: Any, rows: Tensor) -> Tensor:
    """Rows (g, k, n) in the order of V as filters (g k, in / groups, *kernel_size)."""
    shape = (-1, *module.kernel_size, module.in_channels // module.groups)
    return rows.reshape(shape).movedim(-1, 1)


def _low_rank_convolution(module: Any, context: Context, scale: Tensor | None) -> Bound:
    """W = U (S Vᵀ) with orthonormal U: the norm of the map of the r filters S Vᵀ."""
    geometry, taps = geometry_of(module, context), uses(module)
    weight = module.weight if not context.exact else module.weight.detach().double()
    X = module.manifold.unpack(weight)
    left = X.S
    if scale is not None:
        # no longer orthonormal: m filters in place of r
        left = scale.view(*X.U.shape[:-1], 1) * X.U @ X.S
    if not context.exact:
        separate = all(k <= s for k, s in zip(module.kernel_size, module.stride, strict=True))
        if separate and scale is None and module.padding_mode == "zeros":
            return Bound(module.sigma_max().amax(), "core")
        return Bound(
            _map_norm(_filters(module, left @ X.V.mT), context, geometry), "map of filters"
        )
    u, _ = _frames(module)
    kernel = _filters(module, left @ X.V.mT)
    error = taps * linalg.rounding_of_products(2 * X.S.shape[-1] + 2) * _size(X.S) * _size(X.V)
    if scale is not None:
        error *= _size(scale.view(*X.U.shape[:-1], 1) * X.U)
    norm = (float(_map_norm(kernel, context, geometry)) + error) * (u if scale is None else 1.0)
    inner = module.manifold.n + 2 * X.S.shape[-1]
    size = _size(X.U) * _size(X.S) * _size(X.V)
    if scale is not None:
        size *= max(1.0, float(scale.abs().amax()))
    words = _map_words(module.kernel_size, geometry)
    return Bound(
        norm * (_UP if scale is None else _SCALED_UP),
        f"{words}; {module.rank} filters and core",
        _map_cond(kernel, geometry) if scale is None else None,
        **_rounding(context, inner, size, module.bias, taps),
    )


@bounded(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed(module: Any, context: Context) -> Bound:
    """The adjoint of a convolution with the same kernel, then cropped."""
    geometry = {
        "stride": module.stride,
        "dilation": module.dilation,
        "groups": module.groups,
        "padding": 0,
    }
    norm = _map_norm(module.weight, context, geometry)
    if not context.exact:
        return Bound(norm, "map")
    taps, weight = math.prod(module.kernel_size), module.weight
    return Bound(
        float(norm) * _UP,
        "adjoint map, frequencies (Gram) or patches",
        **_rounding(context, taps * weight.shape[0], _size(weight), module.bias, taps),
    )


@bounded(LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d)
def _low_rank_transposed(module: Any, context: Context) -> Bound:
    """The same for the kernel that the factors make."""
    geometry = {
        "stride": module.stride,
        "dilation": module.dilation,
        "groups": module.groups,
        "padding": 0,
    }
    weight = module.weight if not context.exact else module.weight.detach().double()
    X = module.manifold.unpack(weight)
    kernel = module.as_weight(X.U @ X.S @ X.V.mT)
    norm = _map_norm(kernel, context, geometry)
    if not context.exact:
        return Bound(norm, "map")
    taps, rank = math.prod(module.kernel_size), X.S.shape[-1]
    size = _size(X.U) * _size(X.S) * _size(X.V)
    error = taps * linalg.rounding_of_products(2 * rank + 2) * size
    return Bound(
        (float(norm) + error) * _UP,
        "adjoint map, frequencies (Gram) or patches",
        **_rounding(context, taps * module.in_channels + 2 * rank, size, module.bias, taps),
    )


def norm_scale(module: Any, context: Context) -> Tensor:
    """What a batch norm in evaluation mode multiplies each channel by."""
    if module.running_var is None:
        raise BoundError(
            f"{context.name} ({type(module).__name__}) divides by the batch's own deviation: keep "
            "track_running_stats=True"
        )
    scale = (module.running_var + module.eps).rsqrt()
    return scale if module.weight is None else module.weight * scale


@bounded(*NORMS)
def _batch_norm(module: Any, context: Context) -> Bound:
    norm = norm_scale(module, context).abs().amax()
    if not context.exact:
        return Bound(norm, "largest scale")
    how = "largest scale of a channel, running statistics"
    return _shifted(module, context, float(norm) * _UP, how)


@bounded(MeanOnlyBatchNorm)
def _mean_only(module: Any, context: Context) -> Bound:
    how = "shift, running mean"
    return _shifted(module, context, 1.0, how) if context.exact else Bound(1.0, how)


def _shifted(module: Any, context: Context, norm: float, how: str) -> Bound:
    """A scale a channel, at most `norm`, and the shift of a norm in evaluation mode."""
    channels = module.num_features
    pixels = math.prod(context.output_shape or (channels,)) / channels
    shift = _size(module.running_mean) * norm + _size(module.bias)
    return Bound(norm, how, slope=16.0 * norm, offset=16.0 * shift * math.sqrt(pixels))


_MONOTONE = (nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh)


@bounded(ConvexPotential)
def _potential(module: ConvexPotential, context: Context) -> Bound:
    """x - 2 Qᵀ σ(Q x + b): the Jacobian's eigenvalues lie in [1 - 2 ‖Q‖², 1]."""
    act = module.activation
    leaky = type(act) is nn.LeakyReLU and 0.0 <= act.negative_slope <= 1.0
    own = isinstance(act, nn.Module) and find_bound(act) is not None
    if not own or not (leaky or type(act) in _MONOTONE):
        raise BoundError(
            f"{context.name} (ConvexPotential): its activation must be a module that is "
            f"nondecreasing and 1-Lipschitz, one of {[t.__name__ for t in _MONOTONE]} or LeakyReLU "
            f"with a slope in [0, 1], got {act!r}"
        )
    if not computes_as(module.layer, LOW_RANK):
        raise BoundError(no_bound_words(module.layer, f"{context.name}.layer", LOW_RANK))
    if not context.exact:
        return Bound(1.0, "convex potential")
    inner = _low_rank_linear(module.layer, context, None)
    sigma = float(module.layer.sigma_max().detach())
    if not sigma > 0.0:
        raise BoundError(f"{context.name} (ConvexPotential): its weight must not be zero")
    q = float(inner.norm) / sigma * _UP
    m, n = module.layer.manifold.m, module.layer.manifold.n
    # both products: that with Qᵀ sums up m terms
    rounded = 2.0 * (inner.slope / sigma * max(1.0, m / n) + 64.0) * max(q, 1.0)
    # what goes into Qᵀ is of size ‖Q‖ ‖x‖ + ‖b‖, and a sigmoid's values at each position
    inside = _size(module.layer.bias) + math.sqrt(m)
    positions = math.sqrt(math.prod(context.output_shape or (1,)) / n)
    return Bound(
        max(1.0, 2.0 * q * q * _UP - 1.0),
        f"convex potential, ‖Q‖ within {max(q - 1.0, 0.0):.0e} of 1",
        slope=4.0 * rounded * max(q, 1.0),
        offset=4.0 * rounded * inside * max(1.0, positions),
    )
