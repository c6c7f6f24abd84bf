"""The training methods that are compared, each from the same dense start."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import certify
from .._arguments import check_callable, check_instance
from ..nn import LowRankLayer, densify, factorize
from ..optim import CondLR, CondLRAdam, param_groups
from .data import Dataset, check_dataset
from .factors import Rank, two_factors
from .training import History, Normalized, Objective, Settings, check_settings, fit

__all__ = ["Method", "Rank", "Trained", "comparison", "train", "two_factors"]


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


@dataclass
class Trained:
    """A trained network and what is known about it.

    Attributes
    ----------
    model : nn.Module
        Takes images in [0, 1].
    history : History
    weights_kept : float
        Trained parameters as a share of the dense network's (for "svd": stored ones).
    inference_kept : float
        The same with the r x r cores folded into a factor, (m + n) r a layer.
    """

    model: Normalized
    history: History
    weights_kept: float
    inference_kept: float


def train(
    method: Method,
    build: Callable[[], nn.Module],
    data: Dataset,
    rank: Rank,
    settings: Settings,
    *,
    exclude: str | tuple[str, ...] | None = None,
    keep_larger: bool = False,
    dense: Trained | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    checkpoint: Path | None = None,
    save_every: int = 1,
    certified: float | None = None,
) -> Trained:
    """Train one network by one method.

    Parameters
    ----------
    method : Method
    build : callable
        Makes the dense network; called after seeding, so every method starts from the same one.
    data : Dataset
    rank, exclude, keep_larger
        Which layers become low-rank, as in :func:`lrmanifold.factorize`.
    settings : Settings
    dense : Trained, optional
        A dense network trained before: "svd" truncates it instead of training one.
    device : torch.device or str
        Where to train; the network starts the same on every device.
    on_step : callable, optional
        Called after every optimizer step.
    on_resume, checkpoint, save_every
        As in :func:`~lrmanifold.experiments.training.fit`.
    certified : float, optional
        An l2 radius, in the unit of the images, to train for: the worst case that the network's
        Lipschitz bound allows, the radius growing over the first half, by
        :class:`~lrmanifold.optim.CondLRAdam` (AdamW on ordinary parameters).

    Returns
    -------
    Trained
    """
    check_instance("method", method, Method, "a Method, as those of comparison()")
    check_callable("build", build, "a function that makes the dense network")
    check_dataset("data", data)
    check_settings(settings)
    layers: dict[str, Any] = {"exclude": exclude, "keep_larger": keep_larger}
    loop: dict[str, Any] = {
        "on_step": on_step,
        "on_resume": on_resume,
        "checkpoint": checkpoint,
        "save_every": save_every,
    }
    torch.manual_seed(settings.seed)
    network = build()
    size = sum(p.numel() for p in network.parameters())
    if method.kind == "svd":
        if dense is None:
            plain = Method("dense", "dense")
            dense = train(
                plain, build, data, rank, settings, device=device, certified=certified, **loop
            )
        model = copy.deepcopy(dense.model)
        factorize(model.network, rank=rank, tau=None, **layers)
        kept = _shares(model, size)
        densify(model)
        return Trained(model, dense.history, *kept)
    if method.kind == "factors":
        network = two_factors(network, rank, **layers)
    elif method.kind == "condlr":
        network = factorize(network, rank=rank, tau=method.tau, **layers)
    elif method.kind != "dense":
        raise ValueError(f"kind must be dense, svd, factors or condlr, got {method.kind!r}")
    model = Normalized(network, data).to(device)
    if certified is not None:
        settings = dataclasses.replace(settings, optimizer="adam")
        loop["objective"] = _objective(model, data, settings, certified)
        loop["about"] = f"certified loss, eps {certified!r}"
    history = fit(model, _optimizer(model, settings), data, settings, **loop)
    return Trained(model, history, *_shares(model, size))


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The same class for all methods: on ordinary parameters they are SGD and AdamW."""
    decay = settings.weight_decay
    params: Any = param_groups(model, weight_decay=decay) if decay else model.parameters()
    if settings.optimizer == "adam":
        return CondLRAdam(params, settings.lr, weight_decay=decay)
    return CondLR(
        params,
        settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=decay,
    )


def _objective(model: nn.Module, data: Dataset, settings: Settings, eps: float) -> Objective:
    """The certified loss as a function of the step: a run that was cut off goes on alike."""
    steps = settings.steps(data)
    bound = certify.LipschitzBound(model, data.image_shape)
    done = [0]
    loss = certify.CertifiedLoss(eps, lambda _: min(1.0, done[0] / max(1, steps // 2)))

    def objective(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
        done[0] = step
        bound.forget()  # a checkpoint has no warm starts
        return loss(bound, model(x), y)

    return objective


def _shares(model: nn.Module, size: int) -> tuple[float, float]:
    """Parameters, and parameters without the cores, as shares of `size`."""
    count = sum(p.numel() for p in model.parameters())
    low_rank = [m for m in model.modules() if isinstance(m, LowRankLayer)]
    cores = sum(layer.factors.S.numel() for layer in low_rank)
    return count / size, (count - cores) / size
