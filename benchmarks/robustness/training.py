"""One resumable training run: a checkpoint after every epoch, exact continuation."""

from __future__ import annotations

import dataclasses
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.runs import write_atomically
from lrmanifold.experiments.training import History, Normalized

from .experiment import Run, Training
from .methods import Trainee, start


class Stream:
    """An endless stream of mini-batches; its place is one number, so it resumes exactly."""

    def __init__(
        self, data: Dataset, training: Training, seed: int, device: torch.device | str
    ) -> None:
        self.x, self.y = data.train_x.to(device), data.train_y.to(device)
        self.training, self.seed, self.taken = training, seed, 0
        self.per_epoch = math.ceil(len(self.y) / training.batch_size)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __next__(self) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(self.taken, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
            order = torch.randperm(len(self.y), generator=generator)
            self._epoch, self._order = epoch, order.to(self.x.device)
        size = self.training.batch_size
        index = self._order[place * size : (place + 1) * size]
        x, y = self.x[index], self.y[index]
        self.taken += 1
        if self.training.augment == "none" and not self.training.noise:
            return x, y
        generator = torch.Generator().manual_seed(7_919 * self.taken + self.seed)
        if self.training.augment == "crop-flip":
            x = crop_and_flip(x, generator)
        if self.training.noise:
            draw = torch.randn(x.shape, generator=generator).to(x.device)
            x = x + self.training.noise * draw
        return x, y


def crop_and_flip(x: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Shift each image by up to `pad` pixels (zeros come in) and mirror every other, at random."""
    count, _, height, width = x.shape
    shifts = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator).to(x.device)
    flip = (torch.rand(count, 1, generator=generator) < 0.5).to(x.device)
    rows = shifts[0] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(count, -1)
    columns = shifts[1] + torch.where(flip, width - 1 - columns, columns)
    padded = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(count, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclasses.dataclass
class Outcome:
    """A finished run."""

    trainee: Trainee
    history: History
    epoch_seconds: list[float]
    evaluations: int
    steps: int


class OutOfTimeError(Exception):
    """The time for this call is over; everything up to the last epoch is kept."""


def cosine(share: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


def train(
    run: Run,
    data: Dataset,
    lr: float,
    folder: Path | None,
    *,
    device: torch.device | str = "cpu",
    amp: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
    deadline: float = math.inf,
) -> Outcome:
    """Train, or go on after the last epoch that `folder` holds, or only load what is finished.

    Parameters
    ----------
    folder : path or None
        None: nothing is kept (tuning).
    amp : bool
        Forward in bfloat16 under autocast; weights and steps stay in float32.
    on_batch : callable, optional
        Gets the batches done and their total.
    deadline : float
        Of ``time.monotonic``; :class:`OutOfTimeError` when an epoch would begin after it.

    Raises
    ------
    FloatingPointError
        If the loss is not finite.
    """
    trainee = start(run, data, lr, device)
    model, optimizer = trainee.model, trainee.optimizer
    stream = Stream(data, run.training, run.seed, device)
    total = run.training.epochs * stream.per_epoch
    history, seconds, steps = History(), list[float](), 0
    saved = _load(folder)
    if saved is None:
        history.record(model)
    else:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        stream.taken, steps, seconds = saved["taken"], saved["steps"], saved["seconds"]
        history = History(**saved["history"])
    kind = torch.device(device).type
    loss_sum = torch.zeros((), device=device)

    def closure() -> Tensor:
        x, y = next(stream)
        optimizer.zero_grad()
        with torch.autocast(kind, torch.bfloat16, enabled=amp):
            logits = model(x)
        smoothing = run.training.label_smoothing
        loss = F.cross_entropy(logits.float(), y, label_smoothing=smoothing)
        if trainee.regulariser is not None:
            loss = loss + trainee.regulariser()
        loss.backward()
        loss_sum.add_(loss.detach())
        return loss

    model.train()
    for epoch in range(len(history.loss), run.training.epochs):
        if time.monotonic() > deadline:
            raise OutOfTimeError
        begin, before = time.perf_counter(), stream.taken
        loss_sum.zero_()
        while stream.taken < (epoch + 1) * stream.per_epoch:
            for group in optimizer.param_groups:
                group["lr"] = lr * cosine(stream.taken / total)
            trainee.advance(closure)
            steps += 1
            if on_batch is not None:
                on_batch(stream.taken, total)
        history.loss.append(float(loss_sum) / max(1, stream.taken - before))
        if not math.isfinite(history.loss[-1]):
            raise FloatingPointError(f"the loss is not finite after epoch {epoch + 1}, lr = {lr:g}")
        seconds.append(time.perf_counter() - begin)
        history.record(model)
        if folder is not None:
            _save(folder, model, optimizer, history, stream.taken, steps, seconds)
    model.eval()
    return Outcome(trainee, history, seconds, stream.taken, steps)


def _save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: History,
    taken: int,
    steps: int,
    seconds: list[float],
) -> None:
    state = {
        "model": _plain(model.state_dict()),
        "optimizer": _plain(optimizer.state_dict()),
        "history": dataclasses.asdict(history),
        "taken": taken,
        "steps": steps,
        "seconds": seconds,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / "checkpoint.pt", buffer.getvalue())


def _load(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / "checkpoint.pt").is_file():
        return None
    return torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)


def _plain(value: Any) -> Any:
    """Ordinary tensors all through: geoopt's subclass would need its code to be read again."""
    if isinstance(value, Tensor):
        return value.detach().cpu().as_subclass(torch.Tensor).clone()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    return value


def predict(model: Normalized, x: Tensor, batch_size: int = 512) -> Tensor:
    """Logits (N, classes), in evaluation mode and without gradients, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part.to(device)).float().cpu() for part in x.split(batch_size)])
