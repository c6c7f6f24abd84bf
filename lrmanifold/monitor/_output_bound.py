"""Theorem T3: how far the outputs of two networks of one shape can be apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .._evaluation import evaluation_mode
from ..certify.lipschitz import lipschitz
from ..nn import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear

# Whose outputs move by at most a_i δ_i when their parameters move by δ_i; exactly these types.
_LINEAR = (nn.Linear, LowRankLinear)
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, LowRankConv1d, LowRankConv2d, LowRankConv3d,
)  # fmt: skip
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


@torch.no_grad()
def output_bound(
    model: nn.Module, reference: nn.Module, x: Tensor, distance: float | None
) -> Tensor:
    """Bound on ‖f_Y(x) - f_W(x)‖ for each input, see ``Monitor.output_bound``.

    With `distance`, all parameters together may differ by that much: Σ a_i δ_i over Σ δ_i² <=
    distance² is at most distance · sqrt(Σ a_i²).
    """
    x = x.detach().cpu().double()
    ours, theirs = (list(_chain(_float64(net, x))) for net in (model, reference))
    if len(ours) != len(theirs):
        raise ValueError(
            f"output_bound needs models of the same layers, got {len(ours)} and {len(theirs)}"
        )
    if distance is not None:
        _refuse_shared(theirs)
    known = torch.zeros(len(x), dtype=torch.float64)  # with measured changes of the layers
    squares = torch.zeros_like(known)  # Σ a_i², for a joint distance
    for here, there in zip(ours, theirs, strict=True):
        z = _run(there, x)
        stretch = lipschitz(here, tuple(x.shape[1:])).total
        if distance is None:
            known = stretch * known + (_run(here, x) - z).flatten(1).norm(dim=1)
        else:
            squares = stretch**2 * squares + _reach(here, there, x, z)
        x = z
    return known if distance is None else distance * squares.sqrt()


def _float64(net: nn.Module, x: Tensor) -> nn.Module:
    """The copy that has the bound: whatever is not followed there is refused."""
    report = lipschitz(net, tuple(x.shape[1:]))
    if jumps := [row.name for row in report.rows if row.jump]:
        raise ValueError(
            f"output_bound needs functions without jumps, got {', '.join(jumps)}: outputs at "
            "either side of one are apart, however near the inputs are"
        )
    return report.network.model.cpu()


def _chain(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a chain in order; anything else is one layer."""
    if type(module) is not nn.Sequential:
        yield module
        return
    for part in module:
        yield from _chain(part)


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    with evaluation_mode(layer):
        return layer(x.clone())  # layers may write in place


def _refuse_shared(layers: list[nn.Module]) -> None:
    seen: set[int] = set()
    for layer in layers:
        own = {id(p) for p in layer.parameters()}
        if own & seen:
            raise ValueError(
                f"with certified=True a layer may be used once only, got {layer} twice: a change "
                "of its weight acts at every use"
            )
        seen |= own


def _reach(ours: Any, theirs: Any, x: Tensor, z: Tensor) -> Tensor:
    """a² for each input: what a change of length 1 of all parameters does to the output."""
    alike = _settings(ours) == _settings(theirs)
    if alike and type(ours) is type(theirs) and not [*ours.parameters(), *ours.buffers()]:
        return torch.zeros(len(x), dtype=torch.float64)
    kinds = next((k for k in (_LINEAR, _CONVOLUTIONS) if type(ours) in k), ())
    if type(theirs) not in kinds or not alike:
        raise ValueError(
            "with certified=True output_bound needs a chain (nn.Sequential) of the same layers: "
            "linear ones, convolutions and functions without parameters or buffers, got "
            f"{ours} and {theirs}"
        )
    patches = _patches(theirs, x.shape[2:], z.shape[2:])
    # A bias acts at every pixel, or at every place of a sequence.
    places = 0 if theirs.bias is None else z[0].numel() // theirs.bias.numel()
    return (patches * x.flatten(1).norm(dim=1)).square() + places


def _settings(layer: nn.Module) -> dict[str, Any]:
    """What a layer without parameters computes by; of linear ones the geometry."""
    if type(layer) in _LINEAR:
        return {}
    if type(layer) in _CONVOLUTIONS:
        return {name: getattr(layer, name) for name in _GEOMETRY}
    return {k: v for k, v in vars(layer).items() if not k.startswith("_") and k != "training"}


def _patches(layer: nn.Module, size: torch.Size, out: torch.Size) -> float:
    """Root of the number of patches that hold a pixel, times itself: ‖map‖ <= this ‖K‖₂."""
    if not isinstance(layer, _ConvNd):
        return 1.0
    if layer.padding_mode not in ("zeros", "circular"):
        raise ValueError(
            "with certified=True output_bound needs convolutions with zero or circular padding, "
            f"got padding_mode={layer.padding_mode!r}"
        )
    product = 1.0
    axes = zip(layer.kernel_size, layer.stride, layer.dilation, size, out, strict=True)
    for k, s, dilation, n, places in axes:
        # A pixel is in ceil(k/s) patches along an axis; with gaps, in k at most.
        product *= math.ceil(k / s) if dilation == 1 and layer.padding_mode == "zeros" else k
        if layer.padding_mode == "circular":  # wider than the kernel, patches come again
            product *= math.ceil(places * math.gcd(n, s) / n)
    return math.sqrt(product)
