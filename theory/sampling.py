"""Random problems: drawn in float64 on the CPU, so that a seed is one problem everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from lrmanifold import Factors


def eps(x: Tensor | torch.dtype) -> float:
    """Machine epsilon (twice the unit roundoff) of a tensor or dtype."""
    return torch.finfo(x if isinstance(x, torch.dtype) else x.dtype).eps


def dense(X: Factors) -> Tensor:
    """U S Vᵀ."""
    return X.U @ X.S @ X.V.mT


class Entry(NamedTuple):
    """One use of the generator: what was asked for, and the numbers that came."""

    kind: str
    value: Tensor


class Tape:
    """All random numbers of one sample, in order: recorded, or played back with changes.

    This is how the search moves a sample without knowing what it means. An entry that no longer
    fits (a changed size asks for another shape) is drawn anew.
    """

    def __init__(self, given: Sequence[Entry] = ()) -> None:
        self.given, self.entries = list(given), list[Entry]()

    def take(self, kind: str, fresh: Tensor) -> Tensor:
        k = len(self.entries)
        if k < len(self.given):
            known = self.given[k]
            if known.kind == kind and known.value.shape == fresh.shape:
                fresh = known.value
        self.entries.append(Entry(kind, fresh))
        return fresh


_TAPE: ContextVar[Tape | None] = ContextVar("tape", default=None)


@contextmanager
def taped(given: Sequence[Entry] = ()) -> Iterator[Tape]:
    """Within it every :class:`Draw` records on one tape, and plays `given` back."""
    tape = Tape(given)
    token = _TAPE.set(tape)
    try:
        yield tape
    finally:
        _TAPE.reset(token)


def _on_tape(kind: str, fresh: Tensor) -> Tensor:
    tape = _TAPE.get()
    return fresh if tape is None else tape.take(kind, fresh)


class Draw:
    """A seeded source of sizes, spectra and matrices.

    Matrices come as float64 on the CPU; :meth:`give` brings them to the dtype and the device asked
    for, last, so that all precisions and devices see the same problem.

    Parameters
    ----------
    seed : int
    dtype, device
        Of what :meth:`give` returns.
    **fixed
        ``m``, ``n``, ``r``, ``cond``: values to use instead of drawn ones (the tests choose them).
    """

    def __init__(
        self, seed: int, dtype: torch.dtype, device: torch.device, **fixed: float | None
    ) -> None:
        self.seed, self.dtype, self.device = seed, dtype, device
        self.fixed = {key: value for key, value in fixed.items() if value is not None}
        self.generator = torch.Generator().manual_seed(seed)

    # -- numbers

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        # Of a named dtype: in that of the process a seed would be another problem in float64.
        fresh = torch.rand((), dtype=torch.float32, generator=self.generator)
        return low + (high - low) * float(_on_tape("uniform", fresh))

    def log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """Uniform in low..high, both included."""
        drawn = int(torch.randint(low, high + 1, (), generator=self.generator))
        count = high + 1 - low
        share = torch.tensor((drawn - low + 0.5) / count, dtype=torch.float64)
        return low + min(int(float(_on_tape("uniform", share)) * count), count - 1)

    def choose(self, *options):
        return options[self.integer(0, len(options) - 1)]

    def size(self, low: int = 2, high: int = 9, *, full_rank: bool = False) -> tuple[int, int, int]:
        """m, n and a rank: 1, the largest, or anything between; below min(m, n) by default."""
        m = int(self.fixed.get("m", self.integer(low, high)))
        n = int(self.fixed.get("n", self.integer(low, high)))
        largest = min(m, n) - (0 if full_rank else 1)
        r = self.choose(1, largest, self.integer(1, largest))
        return m, n, int(self.fixed.get("r", r))

    def cond(self, low: float = 1.0, high: float = 1e3) -> float:
        """A condition number, log-uniform."""
        drawn = self.log_uniform(low, high)
        return float(self.fixed.get("cond", drawn))

    def distance(self) -> float:
        """Log-uniform from eps^(1/4) to 1: as near as a difference of matrices stays meaningful."""
        return self.log_uniform(eps(self.dtype) ** 0.25, 1.0)

    # -- matrices, float64 on the CPU

    def normal(self, *shape: int) -> Tensor:
        fresh = torch.randn(*shape, dtype=torch.float64, generator=self.generator)
        return _on_tape("normal", fresh)

    def shares(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        fresh = torch.rand(*shape, dtype=torch.float64, generator=self.generator)
        return _on_tape("uniform", fresh)

    def frame(self, n: int, r: int) -> Tensor:
        """Orthonormal columns, uniform up to signs."""
        return torch.linalg.qr(self.normal(n, r)).Q

    def spectrum(self, r: int, cond: float, smallest: float = 1.0) -> Tensor:
        """r decreasing values from cond * smallest to smallest, log-uniform between them."""
        between = self.shares(r).clone()
        between = between.sort(descending=True).values
        between[0], between[-1] = 1.0, 0.0
        return smallest * cond**between

    def core(self, s: Tensor) -> Tensor:
        """A full square matrix with singular values `s`."""
        r = s.shape[-1]
        return self.frame(r, r) @ torch.diag(s) @ self.frame(r, r).mT

    def point(self, m: int, n: int, r: int, cond: float) -> Factors:
        """U S Vᵀ with a full core whose smallest singular value is log-uniform in [0.3, 3]."""
        s = self.spectrum(r, cond, self.log_uniform(0.3, 3.0))
        return Factors(self.frame(m, r), self.core(s), self.frame(n, r))

    # -- to the precision and the device asked for

    def give(self, x: Tensor) -> Tensor:
        return x.to(dtype=self.dtype, device=self.device)

    def give_point(self, X: Factors) -> Factors:
        return Factors(*(self.give(block) for block in X))
