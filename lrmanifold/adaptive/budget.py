"""Options by layer, parameters at given ranks, and which directions to drop for a budget."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from ..nn.layer import LowRankLayer

Layers = Mapping[str, LowRankLayer]
Rule = float | Mapping[str, float]


def value_for(rule: Any, name: str) -> float | None:
    """An option's value for a layer, where it may be given by patterns of names."""
    if isinstance(rule, Mapping):
        return next((v for pattern, v in rule.items() if fnmatchcase(name, pattern)), None)
    return rule


def cost(layer: LowRankLayer, rank: int) -> int:
    """Parameters of a layer's weight at a rank; all groups of a grouped convolution."""
    M = layer.manifold
    return layer.weight[..., 0, 0].numel() * (M.m + rank + M.n) * rank


def excess(layers: Layers, ranks: Mapping[str, int], compression: float) -> float:
    """Parameters above the budget, the share 1 - `compression` of the dense layers'."""
    dense = sum(
        layer.weight[..., 0, 0].numel() * layer.manifold.m * layer.manifold.n
        for layer in (layers[name] for name in ranks)
    )
    return sum(cost(layers[k], r) for k, r in ranks.items()) - (1.0 - compression) * dense


def meet_budget(
    layers: Layers,
    spectra: Mapping[str, Tensor],
    ranks: dict[str, int],
    least: Mapping[str, int],
    compression: float,
) -> None:
    """Lower `ranks` until they fit: cheapest in relative energy per parameter first.

    Parameters
    ----------
    layers : mapping of LowRankLayer
    spectra : mapping of Tensor, shape (..., r)
        Singular values, decreasing.
    ranks : dict
        Changed in place; never below `least`.
    compression : float
        Share of the dense layers' parameters to save.
    """
    energy = {k: _shares(s) for k, s in spectra.items()}
    while excess(layers, ranks, compression) > 0:
        loss = {
            k: energy[k][r - 1] / (cost(layers[k], r) - cost(layers[k], r - 1))
            for k, r in ranks.items()
            if r > least[k]
        }
        if not loss:
            return
        ranks[min(loss, key=loss.__getitem__)] -= 1


def _shares(s: Tensor) -> list[float]:
    """Mean over a batch of σ²/‖S‖²; 0 for a zero core, which loses nothing."""
    squares = s.double().square().reshape(-1, s.shape[-1])
    whole = squares.sum(-1, keepdim=True)
    return (squares / whole.where(whole > 0, 1.0)).mean(0).tolist()
