"""The corrected bound of mathematics 6 beside the measured local condition number.

For the part of a network that the bound covers: the longest tail of linear layers (dense, low-rank
or two factors, with biases) and LeakyReLU. It is all of an MLP and the classifier of LeNet5;
convolutions, pooling and normalisation are not covered, and the whole network's condition number is
given without a bound there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lrmanifold.experiments.factors import TwoFactors
from lrmanifold.experiments.training import Normalized
from lrmanifold.nn import LowRankLinear
from lrmanifold.robustness import condition_number

_PASSIVE = (nn.LeakyReLU, nn.ReLU, nn.Flatten)


def affine(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(W, b) in float64 of a layer that is affine on vectors, else None."""
    bias: Any
    if isinstance(layer, TwoFactors) and all(isinstance(part, nn.Linear) for part in layer):
        parts: list[Any] = list(layer)
        weights = [part.weight.detach().double() for part in parts]
        bias = parts[1].bias
        matrix = weights[1] @ weights[0]
    elif isinstance(layer, LowRankLinear):
        matrix, bias = layer.dense_weight().detach().double(), layer.bias
    elif isinstance(layer, nn.Linear):
        matrix, bias = layer.weight.detach().double(), layer.bias
    else:
        return None
    b = torch.zeros(len(matrix)).to(matrix) if bias is None else bias.detach().double()
    return matrix, b


def tail(network: nn.Module) -> int:
    """Place of the first child of the longest tail that the bound covers."""
    children = list(network.children()) if isinstance(network, nn.Sequential) else []
    first = len(children)
    while first and (isinstance(children[first - 1], _PASSIVE) or affine(children[first - 1])):
        first -= 1
    while first < len(children) and not affine(children[first]):
        first += 1
    return first


def compare(model: Normalized, x: Tensor) -> dict[str, Any]:
    """Measured local condition numbers and the bound, over the images `x` (N, C, H, W).

    Returns
    -------
    dict
        ``network``: quantiles of cond(f; x) of the whole model, in the image's own units.
        ``tail``: of the covered part at its own input; ``bound``: of the bound there;
        ``ratio``: of measured / bound, which must not exceed 1; ``plain_product_violated``: share
        of images where Π κ(W_i) Π cond(σ_i), without the cosines, is smaller than the measured.
    """
    model = model.eval()
    device = next(model.parameters()).device
    whole = condition_number(model, x.to(device))
    found: dict[str, Any] = {"images": len(x), "network": _quantiles(whole.double().cpu())}
    network = model.network
    first = tail(network)
    if first == len(list(network.children())):
        return found
    children = list(network.children())
    with torch.no_grad():
        z: Any = (x.to(device) - model.mean) / model.std
        for hook in network._forward_pre_hooks.values():
            z = hook(network, (z,))[0]
        for child in children[:first]:
            z = child(z)
    z = z.flatten(1)
    measured = condition_number(nn.Sequential(*children[first:]), z).double().cpu()
    bound, plain = torch.ones(len(z)).double(), torch.ones(len(z)).double()
    z = z.double().cpu()
    for child in children[first:]:
        pair = affine(child)
        if pair is not None:
            weight, b = (t.cpu() for t in pair)
            kappa, cosine = _augmented(weight, b, z)
            bound, plain = bound * kappa / cosine, plain * kappa
            z = z @ weight.mT + b
        elif not isinstance(child, nn.Flatten):
            slope = getattr(child, "negative_slope", 0.0)
            after = nn.functional.leaky_relu(z, slope)
            steepest = torch.where((z > 0).any(1), 1.0, slope).double()
            factor = steepest * z.norm(dim=1) / after.norm(dim=1)
            bound, plain, z = bound * factor, plain * factor, after
    found["tail_layers"] = sum(affine(c) is not None for c in children[first:])
    found["tail"] = _quantiles(measured)
    found["bound"] = _quantiles(bound)
    found["ratio"] = _quantiles(measured / bound)
    found["plain_product_violated"] = float((measured > plain).double().mean())
    return found


def _augmented(weight: Tensor, b: Tensor, z: Tensor) -> tuple[float, Tensor]:
    """κ([W b]) and the cosines of (z, 1) to the row space of [W b]."""
    _, s, vh = torch.linalg.svd(torch.cat([weight, b[:, None]], 1), full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())  # factors are float32: smaller ones are rounding
    wide = torch.cat([z, torch.ones(len(z), 1).to(z)], 1)
    return float(s[0] / s[rank - 1]), (wide @ vh[:rank].mT).norm(dim=1) / wide.norm(dim=1)


def _quantiles(values: Tensor) -> dict[str, float]:
    levels = torch.tensor([0.5, 0.9], dtype=torch.float64)
    median, high = torch.quantile(values, levels).tolist()
    return {
        "min": float(values.min()),
        "median": median,
        "q90": high,
        "max": float(values.max()),
    }
