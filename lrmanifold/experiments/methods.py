"""The training methods that are compared, each from the same dense start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import linalg
from ..nn import densify, factorize
from ..nn._plan import LAYERS, make_plan
from ..optim import CondLR
from .data import Dataset
from .training import History, Normalized, Settings, fit

Rank = int | float | Mapping[str, int | float]


@dataclass(frozen=True)
class Method:
    """A way to train: its `name`, and the bound `tau` where it has one.

    Attributes
    ----------
    name : str
        For tables.
    kind : {"dense", "svd", "factors", "condlr"}
        Dense SGD; dense SGD, then truncated to the rank; two free factors A Bᵀ by SGD; CondLR.
    tau : float or None
        For "condlr"; None is the fixed-rank manifold without a bound.
    """

    name: str
    kind: str
    tau: float | None = None


def comparison(taus: tuple[float, ...] = (0.0, 0.1, 0.5)) -> list[Method]:
    """Dense, its truncation, plain low rank, and CondLR for each tau."""
    return [
        Method("dense", "dense"),
        Method("dense, SVD-truncated", "svd"),
        Method("plain low rank (A Bᵀ)", "factors"),
        *(Method(f"CondLR tau={tau:g}", "condlr", tau) for tau in taus),
    ]


def two_factors(model: nn.Module, rank: Rank, **patterns: Any) -> nn.Module:
    """Replace each layer by two free factors, A (m x r) after Bᵀ (r x n), in place.

    The usual low-rank layer without geometry: a thin layer without bias, then one with it. Starts
    balanced from the truncated SVD, A = U √Σ, B = V √Σ.
    """
    plan = make_plan(model, rank=rank, **patterns)
    for decision in plan.decisions:
        if decision.rank is not None:
            parent, _, child = decision.name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, _pair(getattr(owner, child), decision.rank))
    return model


def _pair(module: Any, rank: int) -> nn.Sequential:
    if isinstance(module, nn.Linear):
        first: Any = nn.Linear(module.in_features, rank, bias=False)
        second: Any = nn.Linear(rank, module.out_features, bias=module.bias is not None)
    else:
        if module.groups != 1:
            raise ValueError(f"two_factors takes convolutions without groups, got {module}")
        kind = next(t for t in LAYERS if isinstance(module, t))
        first = kind(
            module.in_channels,
            rank,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            bias=False,
            padding_mode=module.padding_mode,
        )
        second = kind(rank, module.out_channels, 1, bias=module.bias is not None)
    matrix = module.weight.detach().flatten(1).double()
    U, s, Vh = linalg.svd(matrix)
    root = s[:rank].sqrt()
    with torch.no_grad():
        first.weight.copy_((root[:, None] * Vh[:rank]).reshape(first.weight.shape))
        second.weight.copy_((U[:, :rank] * root).reshape(second.weight.shape))
        if module.bias is not None:
            second.bias.copy_(module.bias)
    return nn.Sequential(first, second)


@dataclass
class Trained:
    """A trained network and what is known about it.

    Attributes
    ----------
    model : nn.Module
        Takes images in [0, 1].
    history : History
    weights_kept : float
        Trained parameters as a share of the dense network's.
    """

    model: nn.Module
    history: History
    weights_kept: float


def train(
    method: Method,
    build: Callable[[], nn.Module],
    data: Dataset,
    rank: Rank,
    settings: Settings,
    *,
    exclude: str | tuple[str, ...] | None = None,
    dense: Trained | None = None,
    on_step: Callable[[], None] | None = None,
) -> Trained:
    """Train one network by one method.

    Parameters
    ----------
    method : Method
    build : callable
        Makes the dense network; called after seeding, so every method starts from the same one.
    data : Dataset
    rank, exclude
        Which layers become low-rank, as in :func:`lrmanifold.factorize`.
    settings : Settings
    dense : Trained, optional
        A dense network trained before: "svd" truncates it instead of training one.
    on_step : callable, optional
        Called after every optimizer step.

    Returns
    -------
    Trained
    """
    torch.manual_seed(settings.seed)
    network = build()
    size = sum(p.numel() for p in network.parameters())
    if method.kind == "svd":
        if dense is None:
            plain = Method("dense", "dense")
            dense = train(plain, build, data, rank, settings, on_step=on_step)
        model = copy.deepcopy(dense.model)
        factorize(model.network, rank=rank, tau=None, exclude=exclude)  # type: ignore[arg-type]
        kept = sum(p.numel() for p in model.parameters()) / size
        return Trained(densify(model), dense.history, kept)
    if method.kind == "factors":
        network = two_factors(network, rank, exclude=exclude)
    elif method.kind == "condlr":
        network = factorize(network, rank=rank, tau=method.tau, exclude=exclude)
    elif method.kind != "dense":
        raise ValueError(f"kind must be dense, svd, factors or condlr, got {method.kind!r}")
    model = Normalized(network, data)
    # The same class for all: on ordinary parameters CondLR is torch.optim.SGD.
    optimizer = CondLR(model.parameters(), settings.lr, momentum=settings.momentum)
    history = fit(model, optimizer, data, settings, on_step=on_step)
    return Trained(model, history, sum(p.numel() for p in model.parameters()) / size)
