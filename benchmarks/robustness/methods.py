"""Every rival as a network, an optimizer and a way to advance by one step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

import lrmanifold as lrm
from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.factors import TwoFactors, two_factors
from lrmanifold.experiments.training import Normalized

from .. import models
from .experiment import MULTI_PASS, ConfigError, Run

Closure = Callable[[], Tensor]


@dataclass
class Trainee:
    """A network in training.

    Attributes
    ----------
    model : Normalized
    optimizer : torch.optim.Optimizer
    advance : callable
        Takes a closure that draws the next mini-batch and goes back through its loss; makes a step.
    regulariser : callable or None
        Added to every loss.
    dense_parameters : int
        Of the network before it was changed.
    """

    model: Normalized
    optimizer: torch.optim.Optimizer
    advance: Callable[[Closure], Any]
    regulariser: Callable[[], Tensor] | None
    dense_parameters: int


class OrthogonalConv2d(nn.Module):
    """A convolution whose kernel, as a matrix, is orthogonal by torch's parametrisation.

    torch's own takes a kernel for a batch of k x k matrices, which is something else.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.in_channels, self.kernel_size, self.groups = conv.in_channels, conv.kernel_size, 1
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.bias, self.shape = conv.bias, conv.weight.shape
        matrix = nn.Linear(conv.weight[0].numel(), conv.out_channels, bias=False)
        matrix.weight = nn.Parameter(conv.weight.detach().flatten(1))
        self.matrix: Any = orthogonal(matrix)

    def forward(self, x: Tensor) -> Tensor:
        """The convolution with the matrix in the kernel's shape."""
        kernel = self.matrix.weight.reshape(self.shape)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation)


def start(run: Run, data: Dataset, lr: float, device: torch.device | str) -> Trainee:
    """The dense network of the run's seed, made into what the method trains."""
    torch.manual_seed(run.seed)
    network = models.build(run.training.model, data)
    size = sum(p.numel() for p in network.parameters())
    network = convert(network, run)
    if models.convolutional(run.training.model):
        network.register_forward_pre_hook(_channels_last)
    model = Normalized(network, data).to(device)
    optimizer = _optimizer(model, run, lr)
    multi_pass = run.method.kind in MULTI_PASS

    def advance(closure: Closure) -> Any:
        if multi_pass:
            return optimizer.step(closure)  # type: ignore[arg-type]
        closure()
        return optimizer.step()

    regulariser = None
    if run.method.orthogonality:
        weight = run.method.orthogonality

        def regulariser() -> Tensor:
            return weight * soft_orthogonality(model)

    return Trainee(model, optimizer, advance, regulariser, size)


def convert(network: nn.Module, run: Run) -> nn.Module:
    """Replace layers as the method asks; "svd" trains the dense network."""
    method, kind = run.method, run.method.kind
    layers: dict[str, Any] = {"rank": run.ranks, "keep_larger": True}
    if run.training.exclude:
        layers["exclude"] = run.training.exclude
    if kind in ("dense", "svd"):
        return network
    if kind == "factors":
        return two_factors(network, **layers)
    if kind == "condlr":
        return lrm.factorize(network, tau=method.tau, **layers)
    if kind in ("dlrt", "robust_dlrt"):
        return lrm.factorize(network, tau=None, gradient="probe", **layers)
    if kind == "capped_dlrt":
        return lrm.factorize(network, tau=method.tau, **layers)
    return _constrained(network, kind)


def truncated(model: Normalized, run: Run) -> Normalized:
    """The trained dense model with its layers cut to the run's ranks, best in Frobenius norm."""
    model = copy.deepcopy(model)
    layers: dict[str, Any] = {"exclude": run.training.exclude} if run.training.exclude else {}
    lrm.factorize(model.network, rank=run.ranks, tau=None, keep_larger=True, **layers)
    return model


def _constrained(network: nn.Module, kind: str) -> nn.Module:
    """All layers but the last: a norm of 1 there would bound the logits."""
    names = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for name in names[:-1]:
        parent, _, child = name.rpartition(".")
        owner = network.get_submodule(parent)
        layer: Any = getattr(owner, child)
        if kind == "spectral_norm":
            spectral_norm(layer)
        elif isinstance(layer, nn.Conv2d):
            setattr(owner, child, OrthogonalConv2d(layer))
        else:
            orthogonal(layer)
    return network


def _optimizer(model: nn.Module, run: Run, lr: float) -> torch.optim.Optimizer:
    method, training = run.method, run.training
    decay = training.weight_decay
    groups = lrm.optim.param_groups(model, weight_decay=decay)
    if method.kind == "dlrt":
        return lrm.optim.DLRT(groups, lr, s_steps=method.s_steps, tol=method.tol)
    if method.kind in ("robust_dlrt", "capped_dlrt"):
        if method.tol is None:
            raise ConfigError(f"{method.name}: needs tol")
        if method.kind == "capped_dlrt":
            return lrm.optim.capped_dlrt(groups, lr, tol=method.tol, s_steps=method.s_steps)
        return lrm.optim.robust_dlrt(
            groups, lr, tol=method.tol, beta=method.penalty, s_steps=method.s_steps
        )
    if method.optimizer == "adam":
        if method.kind != "condlr":
            return torch.optim.AdamW(_unnamed(groups), lr, weight_decay=decay)
        return lrm.optim.CondLRAdam(groups, lr, penalty=method.penalty, weight_decay=decay)
    if method.kind != "condlr":
        return torch.optim.SGD(_unnamed(groups), lr, momentum=training.momentum, weight_decay=decay)
    return lrm.optim.CondLR(
        groups, lr, momentum=training.momentum, penalty=method.penalty, weight_decay=decay
    )


def _unnamed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**g, "params": [p for _, p in g["params"]]} for g in groups]


def soft_orthogonality(model: nn.Module) -> Tensor:
    """Σ ‖AᵀA - a I‖² + ‖BᵀB - b I‖² over the pairs of factors, a and b their mean eigenvalues.

    The scale is free, as it is for CondLR: only the conditioning is penalised.
    """
    total: Any = 0.0
    for module in model.modules():
        if isinstance(module, TwoFactors):
            first, second = (layer.weight.flatten(1) for layer in module)  # type: ignore[operator]
            for gram in (first @ first.mT, second.mT @ second):
                mean = gram.diagonal().mean()
                total = total + (gram - mean * torch.eye(len(gram)).to(gram)).square().sum()
    return total


def _channels_last(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    # half again as fast on CPUs; clone, since for one channel any layout passes as both
    return (args[0].clone(memory_format=torch.channels_last),)
