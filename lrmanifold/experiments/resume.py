"""A training run that was cut off goes on: bit for bit as if nothing had happened."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from .._arguments import check_integer, check_path
from .._files import remove_leftovers
from .._sealed import checksum
from ..checkpoint import CheckpointError
from .data import Dataset

RATES = "largest rates of the optimizer"


@dataclasses.dataclass
class Position:
    """Where in its data a run is.

    Attributes
    ----------
    epoch, batch : int
        Complete epochs, and batches done of the next one.
    order : Tensor
        State of the generator at the start of that epoch: it gives the order of its batches.
    total : Tensor, shape ()
        Sum of the losses of that epoch so far.
    count : int
        Examples in it.
    """

    epoch: int
    batch: int
    order: Tensor
    total: Tensor
    count: int


class Keeper:
    """Writes a run to a file every few steps, and takes it up again.

    Parameters
    ----------
    path : path
    every : int
        Steps between two writings. What a killed process loses is at most so many, with 1 the
        current step; the result is the same.
    model, optimizer, schedule
        Whose states are kept.
    identity : dict
        Of words and numbers: a file with another one belongs to another run and is refused.
    defaults : dict
        What keys stand for that an identity leaves out.

    Raises
    ------
    ValueError
        If `every` is not positive.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        identity: dict[str, Any],
        defaults: Mapping[str, Any],
    ) -> None:
        path = Path(check_path("checkpoint", path))
        every = check_integer("save_every", every, low=1)
        self.path, self.every = path, every
        self.identity, self.defaults = identity, defaults
        self.began, self.before = time.perf_counter(), 0.0
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.device = next(model.parameters()).device

    def save(self, position: Position, history: Any) -> None:
        """Write the run as it is now, whole or not at all."""
        extra = {
            "identity": self.identity,
            "position": dict(vars(position)),
            "history": dataclasses.asdict(history),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "seconds": self.before + time.perf_counter() - self.began,
        }
        if self.device.type == "cuda":
            extra["random_cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint.save(self.path, self.model, self.optimizer, extra=extra)

    def resume(self, history: Any) -> Position | None:
        """Bring everything to where the file is, or return None if there is none.

        Raises
        ------
        CheckpointError
            If the file is damaged or belongs to another run; nothing is changed then.
        """
        remove_leftovers(self.path)
        if not self.path.exists():
            return None
        extra = checkpoint.load(self.path, self.model, self.optimizer, migrate=self._checked).extra
        self.schedule.load_state_dict(extra["schedule"])
        for key, value in extra["history"].items():
            setattr(history, key, value)
        torch.set_rng_state(extra["random"])
        if "random_cuda" in extra and self.device.type == "cuda":
            torch.cuda.set_rng_state(extra["random_cuda"], self.device)
        self.began, self.before = time.perf_counter(), extra.get("seconds", 0.0)
        position = Position(**extra["position"])
        position.total = position.total.to(self.device)
        return position

    def _checked(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Refuse another run's file before anything is loaded."""
        extra = payload["extra"]
        if not _is_of_a_run(extra):
            raise CheckpointError(f"{self.path}: is not the checkpoint of a training run")
        words = difference(self.identity, extra["identity"], self.defaults)
        if words is not None:
            raise CheckpointError(
                f"{self.path}: belongs to another run, with {words}: delete it, or use another file"
            )
        return payload


def _is_of_a_run(extra: Any) -> bool:
    """Whether everything is there that :meth:`Keeper.resume` takes."""
    dicts = ("identity", "position", "history", "schedule")
    if not isinstance(extra, dict) or not all(isinstance(extra.get(key), dict) for key in dicts):
        return False
    position = extra["position"]
    fields = {field.name for field in dataclasses.fields(Position)}
    counts = [position.get(key) for key in ("epoch", "batch", "count")]
    return (
        position.keys() == fields
        and all(type(count) is int and count >= 0 for count in counts)
        and all(isinstance(position[key], Tensor) for key in ("order", "total"))
        and isinstance(extra.get("random"), Tensor)
        and isinstance(extra.get("seconds", 0.0), float)  # older files have none
    )


def steps_done(path: Path) -> int | None:
    """The optimizer steps of the run in a file; None if there is no file that can be read."""
    extra = _extra(path)
    return None if extra is None else int(extra["schedule"]["last_epoch"])


def seconds_done(path: Path) -> float:
    """What these steps took, in all sessions; 0 where no file says it."""
    return (_extra(path) or {}).get("seconds", 0.0)


def _extra(path: Path) -> dict[str, Any] | None:
    try:
        extra = checkpoint.peek(path)
    except (CheckpointError, OSError):
        return None
    whole = _is_of_a_run(extra) and type(extra["schedule"].get("last_epoch")) is int
    return extra if whole else None


def identity(
    settings: Any,
    data: Dataset,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: str,
) -> dict[str, Any]:
    """What two runs must have in common for one to go on where the other stopped.

    The optimizer's rates are those at the beginning: it has a schedule already.
    """
    return {
        **settings.to_dict(),
        "data": data.name,
        "training images": len(data.train_y),
        "images (CRC-32)": checksum(data.train_x),
        "labels (CRC-32)": checksum(data.train_y),
        "objective": objective,
        "optimizer": type(optimizer).__name__,
        RATES: [float(group["initial_lr"]) for group in optimizer.param_groups],
        "options of the optimizer": [_options(group) for group in optimizer.param_groups],
        "network": str(model),
    }


def objective_name(objective: Any) -> str:
    """What stands for an objective in an identity: its settings, too, where its repr has them."""
    text = repr(objective)
    if " at 0x" not in text:  # an address is another one in the next process
        return text
    kind = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{kind.__module__}.{kind.__qualname__}"


def checksums(data: Dataset) -> dict[str, list[int]]:
    """Of training and test part: files that have changed are other data of the same name."""
    return {
        "images (CRC-32)": [checksum(data.train_x), checksum(data.test_x)],
        "labels (CRC-32)": [checksum(data.train_y), checksum(data.test_y)],
    }


def _options(group: dict[str, Any]) -> str:
    """What does not change in training: all but the parameters and the scheduled rate."""
    plain = (bool, int, float, str, tuple, type(None))
    kept = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
    return ", ".join(f"{k} {v}" for k, v in sorted(kept.items()) if isinstance(v, plain))


def difference(
    mine: Mapping[str, Any], other: Mapping[str, Any], defaults: Mapping[str, Any]
) -> str | None:
    """The first key in which two records differ, and both values, in words; None if there is none.

    Keys come in the order of `defaults`, which stand for missing ones, then in that of `mine`: what
    a user has set is named before what follows from it.
    """
    mine, other = {**defaults, **mine}, {**defaults, **other}
    for key in {**mine, **other}:
        if mine.get(key) != other.get(key):
            ours, theirs = differing(mine.get(key), other.get(key))
            return f"{key} {theirs} instead of {ours}"
    return None


def differing(mine: Any, other: Any, width: int = 60) -> tuple[str, str]:
    """Two values that differ, in at most `width` characters in which they differ, too."""
    one, two = (" ".join(str(value).split()) for value in (mine, other))
    if one == two:
        one, two = repr(mine), repr(other)
    if max(len(one), len(two)) <= width:
        return one, two
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    start = max(0, (min(len(one), len(two)) if at is None else at) - width // 2)
    return _cut(one, start, width), _cut(two, start, width)


def _cut(text: str, start: int, width: int) -> str:
    before, after = "..." if start else "", "..." if len(text) > start + width else ""
    return f"{before}{text[start : start + width]}{after}"
