"""One training loop for all methods: cosine rate, seeded batches, spectra recorded on the way."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import check_instance, check_integer, check_module, check_number, check_text
from ..checkpoint import CheckpointError
from .data import Dataset, batches, check_dataset
from .factors import spectrum
from .resume import Keeper, Position, identity

Objective = Callable[[Tensor, Tensor, int], Tensor]
# What torch's generators take.
SEEDS = (-(2**63), 2**64 - 1)


@dataclass(frozen=True)
class Settings:
    """How a network is trained; the same for every method that is compared.

    Attributes
    ----------
    epochs, batch_size : int
    lr : float
        Rate at the start; it follows a cosine to 0 over all steps.
    momentum : float
    seed : int
        Of the order of the batches (and, by the callers, of the initial weights).

    Raises
    ------
    TypeError, ValueError
        For a value of the wrong type or out of range.
    """

    epochs: int = 5
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        checked = {
            "epochs": check_integer("epochs", self.epochs, low=1),
            "batch_size": check_integer("batch_size", self.batch_size, low=1),
            "lr": check_number("lr", self.lr, low=0.0, open_low=True),
            "momentum": check_number("momentum", self.momentum, low=0.0, high=1.0, open_high=True),
            "seed": check_integer("seed", self.seed, low=SEEDS[0], high=SEEDS[1]),
        }
        for name, value in checked.items():  # in Python's own types: they are written to files
            object.__setattr__(self, name, value)


def check_settings(value: Settings) -> Settings:
    """Refuse what are no :class:`Settings`."""
    return check_instance("settings", value, Settings, "Settings of experiments.training")


@dataclass
class History:
    """What happened during training.

    Attributes
    ----------
    loss : list of float
        Mean training loss of each epoch.
    spectra : dict
        For each low-rank layer and each pair of two free factors by name, the singular values (r,)
        of its weight before training and after every epoch (of the first group, for grouped
        convolutions).
    cond : list of float
        Largest condition number of any of them at those moments.
    """

    loss: list[float] = field(default_factory=list)
    spectra: dict[str, list[list[float]]] = field(default_factory=dict)
    cond: list[float] = field(default_factory=list)

    def record(self, model: nn.Module) -> None:
        """Append the present spectra and the largest condition number."""
        worst = 1.0
        for name, layer in model.named_modules():
            s = spectrum(layer)
            if s is not None:
                worst = max(worst, float((s[:, 0] / s[:, -1]).max()))
                self.spectra.setdefault(name, []).append(s[0].tolist())
        if self.spectra:
            self.cond.append(worst)


class Normalized(nn.Module):
    """A network that takes images in [0, 1]: subtracts the mean and divides by the std first."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, data: Dataset) -> None:
        super().__init__()
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(data.mean).reshape(shape))
        self.register_buffer("std", torch.tensor(data.std).reshape(shape))
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        return self.network((x - self.mean) / self.std)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    settings: Settings,
    *,
    on_step: Callable[[], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    checkpoint: Path | None = None,
    save_every: int = 1,
    objective: Objective | None = None,
    about: str | None = None,
) -> History:
    """Train, with cross entropy by default; the loop that every comparison uses.

    Parameters
    ----------
    model : nn.Module
        Takes images in [0, 1].
    optimizer : torch.optim.Optimizer
        Its rates are scheduled by a cosine to 0.
    data : Dataset
    settings : Settings
    on_step : callable, optional
        Called after every step (progress bars); for those of a run that is taken up, at its start.
    on_resume : callable, optional
        Called with the number of steps done, if the run is taken up from `checkpoint`.
    checkpoint : path, optional
        A file to which the run is written every `save_every` steps and at its end, whole or not at
        all. If it is there already the run goes on from it, with results equal to the bit to those
        of a run that was never cut off. The file is kept; delete it after saving results.
    save_every : int
        With 1 a process that is killed loses the current step only.
    objective : callable, optional
        From logits, classes and the number of steps done to the loss, in place of cross entropy.
    about : str
        The objective in words, its name by default: a checkpoint of a run with another one is
        refused.

    Returns
    -------
    History

    Raises
    ------
    FloatingPointError
        If the loss of an epoch is not finite.
    CheckpointError
        If `checkpoint` is damaged or belongs to another run.
    OSError
        If it cannot be written.
    """
    check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    check_settings(settings)
    check_dataset("data", data)
    if about is None:
        about = "cross entropy" if objective is None else _name(objective)
    check_text("about", about)
    device = next(check_module("model", model).parameters()).device
    steps = settings.epochs * -(-len(data.train_y) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(settings.seed)
    history, keeper, at = History(), None, None
    if checkpoint is not None:
        same = identity(settings, data, model, optimizer, about)
        keeper = Keeper(checkpoint, save_every, model, optimizer, schedule, same)
        at = keeper.resume(history)
    if at is None:
        history.record(model)
        at = Position(0, 0, generator.get_state(), torch.zeros((), device=device), 0)
    else:
        if on_resume is not None:
            on_resume(schedule.last_epoch)
        for _ in range(schedule.last_epoch if on_step is not None else 0):
            on_step()  # type: ignore[misc]
    model.train()
    while at.epoch < settings.epochs:
        generator.set_state(at.order)
        order = batches(data.train_x, data.train_y, settings.batch_size, generator=generator)
        for x, y in itertools.islice(order, at.batch, None):
            x, y = x.to(device), y.to(device)
            z = model(x)
            if objective is None:
                loss = F.cross_entropy(z, y)
            else:
                loss = objective(z, y, schedule.last_epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            at.total += loss.detach() * len(y)
            at.count += len(y)
            at.batch += 1
            if keeper is not None and schedule.last_epoch % save_every == 0:
                _save(keeper, at, history, settings)
            if on_step is not None:
                on_step()
        history.loss.append(float(at.total) / at.count)
        _check_loss(at, settings)  # before the spectra: those of NaN do not exist
        _check_weights(at, model, settings)
        history.record(model)
        at = Position(at.epoch + 1, 0, generator.get_state(), torch.zeros_like(at.total), 0)
    if keeper is not None:
        _save(keeper, at, history, settings)
    return history


def _name(objective: Objective) -> str:
    kind = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{kind.__module__}.{kind.__qualname__}"


def _save(keeper: Keeper, at: Position, history: History, settings: Settings) -> None:
    _check_loss(at, settings)
    try:
        keeper.save(at, history)
    except CheckpointError as error:  # a state that could not be taken up is not written
        raise FloatingPointError(f"{error}: lower lr = {settings.lr}") from error


def _check_loss(at: Position, settings: Settings) -> None:
    if not torch.isfinite(at.total):
        raise FloatingPointError(
            f"the training loss is not finite in epoch {at.epoch + 1}: lower lr = {settings.lr}"
        )


def _check_weights(at: Position, model: nn.Module, settings: Settings) -> None:
    """The loss is of before the last step: what that step did shows in the weights only."""
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise FloatingPointError(
            f"the weights are not finite after epoch {at.epoch + 1}: lower lr = {settings.lr}"
        )
