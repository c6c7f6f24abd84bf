"""The training methods that are compared, each from the same dense start."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import certify
from .._arguments import (
    check_callable,
    check_flag,
    check_instance,
    check_module,
    check_number,
    check_path,
    shown,
)
from ..nn import LowRankLayer, densify, factorize
from ..optim import DLRT, CondLR, CondLRAdam, param_groups, robust_dlrt
from .adversarial import Adversarial, AdversarialLoss
from .data import Dataset, check_dataset
from .factors import Rank, two_factors
from .orthogonal import orthogonalize
from .training import History, Normalized, Objective, Settings, check_settings, fit

__all__ = ["KINDS", "Method", "Rank", "Trained", "comparison", "train", "two_factors"]


KINDS = (
    "dense", "svd", "finetuned", "factors", "orthogonal", "condlr", "fixed_rank", "dlrt",
    "robust_dlrt",
)  # fmt: skip
# What is not of a method's kind would be ignored.
_OWN = {
    "finetuned": ("finetune",),
    "condlr": ("tau", "penalty"),
    "fixed_rank": ("penalty",),
    "dlrt": ("tol", "s_steps"),
    "robust_dlrt": ("penalty", "tol", "s_steps"),
}


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes
    ----------
    name : str
        For tables.
    kind : one of `KINDS`
        "dense"; "svd", dense, then truncated to the rank; "finetuned", dense for half of the
        epochs, truncated to two factors and trained on for the other half (a radius, if there is
        one, grows once, over both); "factors", two free factors A Bᵀ; "orthogonal", all matrices
        but the last orthogonal, of full rank; "condlr"; "fixed_rank", the same manifold without a
        bound, its gradients by probes, which small singular values do not harm; "dlrt" and
        "robust_dlrt", which choose ranks as they train, by gradient steps without momentum.
    tau : float or None
        For "condlr"; None is no bound, with the gradients of the factors.
    penalty : float
        β of the conditioning penalty R(S), for "condlr", "fixed_rank" and "robust_dlrt".
    tol : float or None
        Tolerance of truncation of the two last kinds; "dlrt" takes None, which keeps the rank.
    s_steps : int
        Of the two last kinds: steps of the core for each of the bases.
    finetune : float
        For "finetuned": the second half's rate as a multiple of `Settings.lr`.

    Raises
    ------
    ValueError
        If `kind` is unknown, or would ignore a field that is given.
    """

    name: str
    kind: str
    tau: float | None = None
    penalty: float = 0.0
    tol: float | None = None
    s_steps: int = 1
    finetune: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if value != field.default and field.name not in _OWN.get(self.kind, ()):
                kinds = " and ".join(kind for kind, own in _OWN.items() if field.name in own)
                raise ValueError(
                    f"{field.name} must be {field.default} for kind {self.kind!r}, which ignores "
                    f"it, got {value!r}: it belongs to {kinds}"
                )

    def to_dict(self) -> dict[str, Any]:
        """For files: what came after the first three only where it is not the default."""
        values = dataclasses.asdict(self)
        rest = [f for f in dataclasses.fields(self)[3:] if values[f.name] == f.default]
        return {key: v for key, v in values.items() if key not in {f.name for f in rest}}


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
        Takes images in [0, 1]; in evaluation mode.
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
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 1,
    certified: float | None = None,
    adversarial: Adversarial | None = None,
    replay: bool = False,
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
        As in :func:`~lrmanifold.experiments.training.fit`. "finetuned" has a checkpoint of its
        first half, too, ``first-NAME`` beside `checkpoint`: delete both in the end.
    certified : float, optional
        An l2 radius, in the unit of the images, to train for: the worst case that the network's
        Lipschitz bound allows, the radius growing over the first half, by
        :class:`~lrmanifold.optim.CondLRAdam` (AdamW on ordinary parameters). This loss has no label
        smoothing.
    adversarial : Adversarial, optional
        Train on images that an attack finds.
    replay : bool
        As in :func:`~lrmanifold.experiments.training.fit`, with an optimizer that is capturable.
        Without effect where no step can be captured: "orthogonal", "dlrt", "robust_dlrt", and with
        `certified`.

    Returns
    -------
    Trained
    """
    check_instance("method", method, Method, "a Method, as those of comparison()")
    _check_build(build)
    check_dataset("data", data)
    check_settings(settings)
    if certified is not None and settings.label_smoothing:
        raise ValueError(
            "label_smoothing of settings must be 0 with certified, whose loss has none, got "
            f"{settings.label_smoothing}"
        )
    if adversarial is not None:
        check_instance("adversarial", adversarial, Adversarial, "an Adversarial")
        if certified is not None:
            raise ValueError("certified and adversarial are two losses: give one of them")
    if dense is not None:
        check_instance("dense", dense, Trained, "a Trained, as train() returns it")
    if checkpoint is not None:
        checkpoint = Path(check_path("checkpoint", checkpoint))
    layers: dict[str, Any] = {"exclude": exclude, "keep_larger": keep_larger}
    trained = _trained(
        method, build, data, rank, settings, layers, (0, settings.steps(data)), dense=dense,
        device=device, on_step=on_step, on_resume=on_resume, checkpoint=checkpoint,
        save_every=save_every, certified=certified, adversarial=adversarial,
        replay=check_flag("replay", replay),
    )  # fmt: skip
    trained.model.eval()  # or a look at test images would change averages of batch norm
    return trained


def _trained(
    method: Method,
    build: Callable[[], nn.Module],
    data: Dataset,
    rank: Rank,
    settings: Settings,
    layers: dict[str, Any],
    span: tuple[int, int],
    *,
    dense: Trained | None = None,
    device: torch.device | str,
    certified: float | None,
    adversarial: Adversarial | None,
    replay: bool,
    **loop: Any,
) -> Trained:
    """`span`: batches before, and of the whole training, over which a radius grows once."""
    torch.manual_seed(settings.seed)
    network = check_module("build()", build())
    size = sum(p.numel() for p in network.parameters())
    kept: dict[str, Any] = {
        "device": device, "certified": certified, "adversarial": adversarial, "replay": replay,
    }  # fmt: skip
    again = functools.partial(_trained, Method("dense", "dense"), build, data, rank)
    if method.kind == "svd":
        if dense is None:
            dense = again(settings, layers, span, **kept, **loop)
        model = copy.deepcopy(dense.model)
        factorize(model.network, rank=rank, tau=None, **layers)
        shares = _shares(model, size)
        densify(model)
        return Trained(model, dense.history, *shares)
    before: list[float] = []
    if method.kind == "finetuned":
        if settings.epochs < 2:
            raise ValueError(f"finetuned needs settings.epochs >= 2, got {settings.epochs}")
        half = settings.epochs // 2
        first = dataclasses.replace(settings, epochs=settings.epochs - half)
        beside = {**loop, "checkpoint": _beside(loop["checkpoint"])}
        dense = again(first, layers, span, **kept, **beside)
        network, before = dense.model.network, dense.history.loss
        settings = dataclasses.replace(settings, epochs=half, lr=settings.lr * method.finetune)
        span = (first.steps(data), span[1])
        loop["done"] = first.epochs  # or this half saw the batches of the first once more
    if method.kind in ("factors", "finetuned"):
        network = two_factors(network, rank, **layers)
    elif method.kind == "orthogonal":
        network = orthogonalize(network)
    elif method.kind != "dense":
        bound = {"tau": method.tau} if method.kind == "condlr" else PROBED
        network = factorize(network, rank=rank, **bound, **layers)
    model = Normalized(network, data, channels_last=settings.channels_last).to(device)
    part = "" if span == (0, settings.steps(data)) else f", from batch {span[0]} of {span[1]}"
    if certified is not None:
        settings = dataclasses.replace(settings, optimizer="adam")
        loop["objective"] = _objective(model, data, span, certified)
        loop["about"] = f"certified loss, eps {certified!r}{part}"
    if adversarial is not None:
        loop["objective"] = AdversarialLoss(
            adversarial,
            span[1],
            seed=settings.seed,
            label_smoothing=settings.label_smoothing,
            done=span[0],
        )
        loop["about"] = f"{adversarial!r}{part}"
    loop["closure"] = method.kind in ("dlrt", "robust_dlrt")
    # the solver inside the orthogonal map waits for the device: such a step cannot be captured
    waits = loop["closure"] or method.kind == "orthogonal"
    loop["replay"] = replay and not waits and model.mean.is_cuda
    optimizer = _optimizer(model, method, settings, capturable=loop["replay"])
    history = fit(model, optimizer, data, settings, **loop)
    history.loss = before + history.loss
    return Trained(model, history, *_shares(model, size))


PROBED: dict[str, Any] = {"tau": None, "gradient": "probe"}


def _check_build(build: Any) -> None:
    wanted = "a function that makes the dense network"
    if isinstance(build, nn.Module):  # which can be called, too
        hint = "give lambda: copy.deepcopy(network), so that every method starts from the same one"
        raise TypeError(f"build must be {wanted}, got {shown(build)}: {hint}")
    check_callable("build", build, wanted)


def _beside(checkpoint: Path | None) -> Path | None:
    """The file of the first half of a training in two parts."""
    return None if checkpoint is None else checkpoint.with_name(f"first-{checkpoint.name}")


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Coordinates of orthogonal matrices are not decayed: smaller ones make no smaller matrix."""
    groups = param_groups(model, weight_decay=decay)
    coordinates = [pair for g in groups for pair in g["params"] if "parametrizations" in pair[0]]
    if not coordinates:
        return groups
    names = {name for name, _ in coordinates}
    for group in groups:
        group["params"] = [pair for pair in group["params"] if pair[0] not in names]
    rest = [group for group in groups if group["params"]]
    return [*rest, {"name": "orthogonal", "params": coordinates, "weight_decay": 0.0}]


def _optimizer(
    model: nn.Module, method: Method, settings: Settings, *, capturable: bool
) -> torch.optim.Optimizer:
    """The same class for all methods of one step: on ordinary parameters SGD or AdamW."""
    lr, decay = settings.lr, settings.weight_decay
    params: Any = _groups(model, decay) if decay else model.parameters()
    if method.kind in ("dlrt", "robust_dlrt") and settings.optimizer != "sgd":
        raise ValueError(f"{method.kind} takes optimizer 'sgd' alone, got {settings.optimizer!r}")
    if method.kind == "dlrt":
        return DLRT(params, lr, s_steps=method.s_steps, tol=method.tol)
    if method.kind == "robust_dlrt":
        tol = check_number("tol", method.tol, low=0.0)
        return robust_dlrt(params, lr, tol=tol, beta=method.penalty, s_steps=method.s_steps)
    common: dict[str, Any] = {
        "weight_decay": decay, "penalty": method.penalty, "capturable": capturable,
    }  # fmt: skip
    if settings.optimizer == "adam":
        return CondLRAdam(params, lr, **common)
    momentum, nesterov = settings.momentum, settings.nesterov
    return CondLR(params, lr, momentum=momentum, nesterov=nesterov, **common)


def _objective(model: nn.Module, data: Dataset, span: tuple[int, int], eps: float) -> Objective:
    """The certified loss as a function of the step: a run that was cut off goes on alike."""
    before, steps = span
    bound = certify.LipschitzBound(model, data.image_shape)
    done = [0]
    loss = certify.CertifiedLoss(eps, lambda _: min(1.0, done[0] / max(1, steps // 2)))

    def objective(model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
        done[0] = before + step
        bound.forget()  # a checkpoint has no warm starts
        return loss(bound, model(x), y)

    return objective


def _shares(model: nn.Module, size: int) -> tuple[float, float]:
    """Parameters, and parameters without the cores, as shares of `size`."""
    count = sum(p.numel() for p in model.parameters())
    low_rank = [m for m in model.modules() if isinstance(m, LowRankLayer)]
    cores = sum(layer.factors.S.numel() for layer in low_rank)
    return count / size, (count - cores) / size
