"""Size, cost, conditioning and calibration of a trained network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.factors import TwoFactors
from lrmanifold.experiments.training import History
from lrmanifold.nn import LowRankLayer

from .methods import OrthogonalConv2d
from .training import predict


def sizes(model: nn.Module, dense: int) -> dict[str, Any]:
    """Parameters as trained, and with the r x r cores folded for inference; shares of `dense`."""
    trained = sum(p.numel() for p in model.parameters())
    cores = sum(m.factors.S.numel() for m in model.modules() if isinstance(m, LowRankLayer))
    return {
        "dense": dense,
        "trained": trained,
        "folded": trained - cores,
        "trained_share": trained / dense,
        "folded_share": (trained - cores) / dense,
    }


def multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Multiplications of one forward pass of `image` (1, C, H, W) in linear and conv layers.

    Low-rank layers with the core folded: r (m + n) for each output position.
    """
    total = 0
    handles = []

    def count(module: Any, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, LowRankLayer):
            m, n, r = module.manifold.m, module.manifold.n, module.rank
            total += output.numel() // m * r * (m + n)
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        else:
            kernel = math.prod(module.kernel_size)
            total += output.numel() * module.in_channels // module.groups * kernel

    for module in network.modules():
        if isinstance(module, (LowRankLayer, nn.Linear, nn.Conv2d, OrthogonalConv2d)):
            handles.append(module.register_forward_hook(count))
    try:
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return total


def layer_conds(model: nn.Module) -> dict[str, dict[str, float]]:
    """cond, largest and smallest nonzero singular value of each layer's weight as a matrix."""
    found: dict[str, dict[str, float]] = {}
    pairs = {n: m for n, m in model.named_modules() if isinstance(m, TwoFactors)}
    for layer in lrm.report(model).layers:
        if any(layer.name.startswith(f"{name}.") for name in pairs):
            continue
        name = layer.name.removeprefix("network.").removesuffix(".matrix")
        found[name] = {
            "rank": layer.rank,
            "cond": layer.cond,
            "max": layer.sigma_max,
            "min": layer.sigma_min,
        }
    for name, pair in pairs.items():
        s = pair.svdvals()
        found[name.removeprefix("network.")] = {
            "rank": len(s),
            "cond": float(s[0] / s[-1]),
            "max": float(s[0]),
            "min": float(s[-1]),
        }
    return found


def calibration(logits: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean |confidence - accuracy| over equal bins of confidence."""
    confidence, label = logits.softmax(1).max(1)
    right = (label == y).float()
    place = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins).index_add_(0, place, confidence - right)
    return float(gap.abs().sum() / len(y))


def clean(model: Any, data: Dataset) -> dict[str, float]:
    """Accuracy, cross entropy and calibration on all test images."""
    logits = predict(model, data.test_x)
    return {
        "accuracy": float((logits.argmax(1) == data.test_y).float().mean()),
        "cross_entropy": float(nn.functional.cross_entropy(logits, data.test_y)),
        "ece": calibration(logits, data.test_y),
    }


def spectra(history: History, points: int = 9) -> dict[str, list[list[float]]]:
    """Each layer's singular values before training and after each epoch, thinned to quantiles."""
    found = {}
    for name, moments in history.spectra.items():
        kept = []
        for s in moments:
            index = torch.linspace(0, len(s) - 1, min(points, len(s))).round().long().tolist()
            kept.append([s[i] for i in index])
        found[name.removeprefix("network.")] = kept
    return found
