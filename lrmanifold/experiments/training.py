"""One training loop for all methods: rates, seeded batches, spectra recorded on the way."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import (
    check_choice,
    check_flag,
    check_instance,
    check_integer,
    check_module,
    check_number,
    check_text,
    shown,
)
from .._worst import worst
from ..checkpoint import CheckpointError
from .adversarial import AdversarialLoss, logits_of
from .data import Dataset, check_dataset
from .factors import spectrum
from .rates import scheduled
from .replay import Replay, check_rates
from .resume import RATES, Keeper, Position, identity, objective_name
from .stream import AUGMENTATIONS, Stream

Objective = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
# What torch's generators take.
SEEDS = (-(2**63), 2**64 - 1)
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("cosine", "linear")


@dataclass(frozen=True)
class Settings:
    """How a network is trained; the same for every method that is compared.

    Attributes
    ----------
    epochs, batch_size : int
    lr : float
        The largest rate; it falls to 0 over all steps.
    momentum : float
        Of "sgd".
    seed : int
        Of the order of the batches (and, by the callers, of the initial weights).
    optimizer : {"sgd", "adam"}
        CondLR or CondLRAdam, which are SGD and AdamW on ordinary parameters.
    weight_decay : float
        Of matrices and larger tensors; on a low-rank weight it acts on the core alone.
    label_smoothing : float
    nesterov : bool
    schedule : {"cosine", "linear"}
        How the rate falls.
    warmup : float
        Share of the steps over which it rises first, linearly.
    augment : {"none", "crop-flip"}
    bfloat16 : bool
        Forward passes under autocast; weights and steps stay in float32. On a processor without
        bfloat16 instructions several times slower than float32.
    channels_last : bool
        Layout of images in memory: faster for convolutions on CPUs, the same up to rounding.

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
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    nesterov: bool = False
    schedule: str = "cosine"
    warmup: float = 0.0
    augment: str = "none"
    bfloat16: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        share: dict[str, Any] = {"low": 0.0, "high": 1.0, "open_high": True}
        checked = {
            "epochs": check_integer("epochs", self.epochs, low=1),
            "batch_size": check_integer("batch_size", self.batch_size, low=1),
            "lr": check_number("lr", self.lr, low=0.0, open_low=True),
            "momentum": check_number("momentum", self.momentum, **share),
            "seed": check_integer("seed", self.seed, low=SEEDS[0], high=SEEDS[1]),
            "optimizer": check_choice("optimizer", self.optimizer, OPTIMIZERS),
            "weight_decay": check_number("weight_decay", self.weight_decay, low=0.0),
            "label_smoothing": check_number("label_smoothing", self.label_smoothing, **share),
            "nesterov": check_flag("nesterov", self.nesterov),
            "schedule": check_choice("schedule", self.schedule, SCHEDULES),
            "warmup": check_number("warmup", self.warmup, **share),
            "augment": check_choice("augment", self.augment, AUGMENTATIONS),
            "bfloat16": check_flag("bfloat16", self.bfloat16),
            "channels_last": check_flag("channels_last", self.channels_last),
        }
        for name, value in checked.items():  # in Python's own types: they are written to files
            object.__setattr__(self, name, value)
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("nesterov needs optimizer 'sgd' and a momentum > 0")

    def to_dict(self) -> dict[str, Any]:
        """For files: options that came after the first five only where they are not the default.

        So runs and checkpoints from before such an option stay the same runs.
        """
        fields = dataclasses.fields(self)
        values = {f.name: getattr(self, f.name) for f in fields}
        return {
            f.name: values[f.name]
            for i, f in enumerate(fields)
            if i < 5 or values[f.name] != f.default
        }

    def steps(self, data: Dataset) -> int:
        """Batches of the whole training."""
        return self.epochs * -(-len(data.train_y) // self.batch_size)


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
        """Append the present spectra and the largest condition number, NaN if one is."""
        cond = 1.0
        for name, layer in model.named_modules():
            s = spectrum(layer)
            if s is not None:
                cond = worst((cond, float((s[:, 0] / s[:, -1]).max())))
                self.spectra.setdefault(name, []).append(s[0].tolist())
        if self.spectra:
            self.cond.append(cond)


class Normalized(nn.Module):
    """A network that takes images in [0, 1]: subtracts the mean and divides by the std first."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, data: Dataset, *, channels_last: bool = False) -> None:
        super().__init__()
        self.channels_last = channels_last
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(data.mean).reshape(shape))
        self.register_buffer("std", torch.tensor(data.std).reshape(shape))
        self.network = check_module("network", network)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        x = (x - self.mean) / self.std
        if self.channels_last:
            # a copy: with one channel any layout passes as both
            x = x.clone(memory_format=torch.channels_last)
        return self.network(x)


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
    closure: bool = False,
    replay: bool = False,
    done: int = 0,
) -> History:
    """Train, with cross entropy by default; the loop that every comparison uses.

    Parameters
    ----------
    model : nn.Module
        Takes images in [0, 1].
    optimizer : torch.optim.Optimizer
        Its rates, not ``settings.lr``, are the largest of the schedule, and it has them again at
        the end; its other options count, too, not those of `settings`.
    data : Dataset
    settings : Settings
    on_step : callable, optional
        Called for every batch after its step (progress bars); for those of a run that is taken up,
        at its start.
    on_resume : callable, optional
        Called with the number of batches done, if the run is taken up from `checkpoint`.
    checkpoint : path, optional
        A file to which the run is written every `save_every` batches and at its end, whole or not
        at all. If it is there already the run goes on from it, with results equal to the bit to
        those of a run that was never cut off. The file is kept; delete it after saving results.
    save_every : int
        With 1 a process that is killed loses the current step only.
    objective : callable, optional
        From the model, images, classes and the number of batches done to the loss, in place of
        cross entropy.
    about : str
        The objective in words: a checkpoint of a run with another one is refused. By default its
        ``repr``, if it has one of its own, else its name, which says nothing of its settings.
    closure : bool
        For optimizers that evaluate several batches a step: ``step`` gets a function that draws the
        next one. The number of batches is the same, so they make fewer steps.
    replay : bool
        On CUDA, capture a step after three and replay it, for networks that take longer to launch
        than to compute: :mod:`~lrmanifold.experiments.replay` says what such a step may do. The
        optimizer must be ``capturable``. Results agree up to rounding with those of steps as they
        are, and so do those of a run that was cut off. No warning tells of skipped steps then: see
        ``optimizer.skipped_steps``. Without effect on the CPU, with `closure`, and with an
        `objective` other than :class:`~lrmanifold.experiments.adversarial.AdversarialLoss`, which
        may compute anything.
    done : int
        Epochs that an earlier part of the training took, of the same seed: order and crops of the
        images go on behind them.

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
        If it cannot be written before the training has ended; at the end that is a warning.
    ValueError
        If the optimizer was built before layers were replaced, so that it holds old weights; if a
        step is to be captured and a rate of the optimizer is no tensor on the device.
    CaptureError
        If the step cannot be captured. The model is a few steps further; a new process goes on
        from `checkpoint` with the same options of the optimizer and without `replay`.
    """
    check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    check_settings(settings)
    check_dataset("data", data)
    if about is None:
        about = "cross entropy" if objective is None else objective_name(objective)
    check_text("about", about)
    if check_integer("done", done, low=0):
        about += f", after {done} epochs"
    _check_moves(check_module("model", model), optimizer)
    device = next(model.parameters()).device
    captured = check_flag("replay", replay) and device.type == "cuda" and not closure
    captured &= objective is None or type(objective) is AdversarialLoss
    # what an objective draws for a step is an input of the captured step, not a part of it
    drawn: Any = objective if captured else None
    if captured:
        check_rates(optimizer, device)
    with scheduled(optimizer, settings, settings.steps(data)) as schedule:
        stream = Stream(data, settings, device, done)
        history, keeper, at = History(), None, None
        if checkpoint is not None:
            same = identity(settings, data, model, optimizer, about)
            # files from before rates were noted are taken
            known = {**vars(Settings()), RATES: same[RATES]}
            keeper = Keeper(checkpoint, save_every, model, optimizer, schedule, same, known)
            at = keeper.resume(history)
        if at is None:
            history.record(model)
            at = Position(0, 0, stream.order, torch.zeros((), device=device), 0)
        else:
            if on_resume is not None:
                on_resume(schedule.last_epoch)
            for _ in range(schedule.last_epoch if on_step is not None else 0):
                on_step()  # type: ignore[misc]
        stream.go_to(at, schedule.last_epoch)
        smoothing = settings.label_smoothing

        def draws(x: Tensor) -> tuple[Tensor, ...]:
            if drawn is None:
                return ()
            place = schedule.last_epoch
            radius = torch.tensor(drawn.radius(place), dtype=x.dtype)
            return radius.to(x.device, non_blocking=True), drawn.start(x, place)

        def loss_of(x: Tensor, y: Tensor, *given: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
                if drawn is not None:
                    loss = drawn.loss(model, x, y, *given)
                elif objective is not None:
                    loss = objective(model, x, y, schedule.last_epoch)
                else:
                    loss = F.cross_entropy(logits_of(model, x), y, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            return loss.detach()

        def step_on(*inputs: Tensor) -> Tensor:
            loss = loss_of(*inputs)
            optimizer.step()
            return loss

        step = Replay(step_on, device, enabled=captured)

        def next_by(function: Callable[..., Tensor | None]) -> Tensor:
            x, y = next(stream)
            loss = function(x, y, *draws(x))
            assert loss is not None
            at.total += loss * len(y)
            at.count += len(y)
            return loss

        model.train()
        while at.epoch < settings.epochs:
            before = schedule.last_epoch
            if closure:
                optimizer.step(lambda: next_by(loss_of))  # type: ignore[arg-type, return-value]
            else:
                next_by(step)
            for _ in range(stream.taken - before):
                schedule.step()
            ended, (at.epoch, at.batch, at.order) = at.epoch, stream.place()
            if at.epoch > ended:
                history.loss += [float(at.total) / at.count] * (at.epoch - ended)
                _check_loss(at, ended, settings)  # before the spectra: those of NaN do not exist
                _check_weights(ended, model, settings)
                history.record(model)
                at.total, at.count = torch.zeros_like(at.total), 0
            if keeper is not None and before // save_every < stream.taken // save_every:
                _save(keeper, at, history, settings)
            for _ in range(stream.taken - before if on_step is not None else 0):
                on_step()  # type: ignore[misc]
        if keeper is not None:
            _save(keeper, at, history, settings)
        return history


def _check_moves(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer of other weights than the model has: these would stay as they are."""
    own = dict(model.named_parameters())
    if not own:
        raise ValueError(f"model must have parameters, got {shown(model)} without any")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    left = [name for name, p in own.items() if p.requires_grad and id(p) not in held]
    # weights left out on purpose are fine, and so are an objective's own ones
    if left and held - {id(p) for p in own.values()}:
        raise ValueError(
            f"optimizer must hold the weights of the model, got others in the place of {left[0]!r}"
            f"{', ...' if len(left) > 1 else ''}: factorize first, then build the optimizer"
        )


def _save(keeper: Keeper, at: Position, history: History, settings: Settings) -> None:
    _check_loss(at, at.epoch, settings)
    try:
        keeper.save(at, history)
    except CheckpointError as error:  # a state that could not be taken up is not written
        raise FloatingPointError(
            f"{error}: lower lr = {settings.lr}, to {settings.lr / 10:g} for example"
        ) from error
    except OSError as error:
        if at.epoch < settings.epochs:
            raise
        # the training has ended: what it found is worth more than the file to go on from
        warnings.warn(f"the last checkpoint could not be written: {error}", stacklevel=3)


def _check_loss(at: Position, epoch: int, settings: Settings) -> None:
    if not torch.isfinite(at.total):
        raise FloatingPointError(
            f"the training loss is not finite in epoch {epoch + 1}: lower lr = {settings.lr}, "
            f"to {settings.lr / 10:g} for example"
        )


def _check_weights(epoch: int, model: nn.Module, settings: Settings) -> None:
    """The loss is of before the last step: what that step did shows in the weights only."""
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise FloatingPointError(
            f"the weights are not finite after epoch {epoch + 1}: lower lr = {settings.lr}, "
            f"to {settings.lr / 10:g} for example"
        )
