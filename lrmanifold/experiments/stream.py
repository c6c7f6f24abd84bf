"""An endless stream of training batches that can be taken up at any place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Dataset, batches
from .resume import Position

if TYPE_CHECKING:
    from .training import Settings

AUGMENTATIONS = ("none", "crop-flip")


class Stream:
    """Batches of the training images, epoch after epoch, on a device; one order for each seed.

    `done`: epochs that an earlier part of the training took from such a stream; this one goes on
    behind them.

    Attributes
    ----------
    taken : int
        Batches since the beginning of this part of the training.
    order : Tensor
        State of the generator at the start of the present epoch.
    """

    def __init__(
        self, data: Dataset, settings: Settings, device: torch.device, done: int = 0
    ) -> None:
        self.data, self.settings, self.device = data, settings, device
        self._generator = torch.Generator().manual_seed(settings.seed)
        for _ in range(done):
            self._pass()  # draws its order at once
        self.order, self.taken = self._generator.get_state(), 0
        self._epoch, self._batch = 0, 0
        self._per_epoch = -(-len(data.train_y) // settings.batch_size)
        self._before = done * self._per_epoch
        self._rest: Iterator[tuple[Tensor, Tensor]] | None = None

    def go_to(self, at: Position, taken: int) -> None:
        """Go on from a place of an earlier stream."""
        self.order, self.taken = at.order, taken
        self._epoch, self._batch = at.epoch, at.batch
        self._generator.set_state(at.order)
        self._rest = itertools.islice(self._pass(), at.batch, None)

    def place(self) -> tuple[int, int, Tensor]:
        """Complete epochs, batches of the next one, and the order of its batches."""
        return self._epoch, self._batch, self.order

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self._rest is None:
            self._rest = self._pass()
        x, y = next(self._rest)
        self.taken += 1
        self._batch += 1
        if self._batch == self._per_epoch:
            self._epoch, self._batch = self._epoch + 1, 0
            self.order, self._rest = self._generator.get_state(), None
        x, y = x.to(self.device), y.to(self.device)
        if self.settings.augment == "crop-flip":
            # by the place in the stream: a run that was cut off draws the same
            x = crop_and_flip(x, _generator(self.settings.seed, self._before + self.taken))
        return x, y

    def _pass(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y, size = self.data.train_x, self.data.train_y, self.settings.batch_size
        return batches(x, y, size, generator=self._generator)


def _generator(seed: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((7_919 * place + seed) % 2**63)


def crop_and_flip(x: Tensor, generator: torch.Generator, pad: int = 2) -> Tensor:
    """Shift each image (B, C, H, W) by up to `pad` pixels and mirror every other, at random.

    What comes in at an edge is the reflection of what lies inside.
    """
    count, _, height, width = x.shape
    shifts = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator).to(x.device)
    flip = (torch.rand(count, 1, dtype=torch.float32, generator=generator) < 0.5).to(x.device)
    rows = shifts[0] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(count, -1)
    columns = shifts[1] + torch.where(flip, width - 1 - columns, columns)
    padded = F.pad(x, (pad,) * 4, mode="reflect").permute(0, 2, 3, 1)
    image = torch.arange(count, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
