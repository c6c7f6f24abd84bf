"""Clocks and limits: interleaved rounds, quartiles, the machine's GEMM rate, flops of a step.

Times of one callable on a shared machine say little; ratios of callables that ran in the same
round say much. So all callables of a comparison run once a round, A B C A B C ..., and a ratio is
the median of the rounds' ratios.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

Shape = tuple[int, int, int]

# Every task runs at least this often, however slow it is.
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Quartiles:
    """Median with lower and upper quartile."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quartiles:
        """Of the finite ones among `values`; NaN if there is none."""
        known = [v for v in values if math.isfinite(v)]
        if len(known) < 2:
            value = known[0] if known else math.nan
            return cls(value, value, value)
        lower, median, upper = statistics.quantiles(known, n=4, method="inclusive")
        return cls(median, lower, upper)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """What is timed: `phases` one after the other; `prepare` runs before them, untimed."""

    phases: Mapping[str, Callable[[], Any]]
    prepare: Callable[[], Any] | None = None


@dataclass
class Samples:
    """Seconds of each task's phases in each round; NaN in rounds that a slow task sat out."""

    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def values(self, name: str, phase: str | None = None) -> list[float]:
        """Seconds round by round, of one phase or of the whole task."""
        phases = self.seconds[name]
        if phase is not None:
            return phases[phase]
        return [sum(parts) for parts in zip(*phases.values(), strict=True)]

    def time(self, name: str, phase: str | None = None) -> Quartiles:
        """Seconds."""
        return Quartiles.of(self.values(name, phase))

    def ratio(self, name: str, reference: str, phase: str | None = None) -> Quartiles:
        """`name` / `reference`, taken within each round."""
        pairs = zip(self.values(name, phase), self.values(reference, phase), strict=True)
        return Quartiles.of(a / b for a, b in pairs)

    def share(self, name: str, phase: str, of: str) -> Quartiles:
        """Phase `phase` over phase `of` of the same task, taken within each round."""
        pairs = zip(self.values(name, phase), self.values(name, of), strict=True)
        return Quartiles.of(a / b for a, b in pairs)


def _stamp(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it is one to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run(task: Task, device: torch.device) -> list[Any]:
    if task.prepare is not None:
        task.prepare()
    stamps = [_stamp(device)]
    for phase in task.phases.values():
        phase()
        stamps.append(_stamp(device))
    return stamps


def interleave(
    tasks: Mapping[str, Task | Callable[[], Any]],
    *,
    device: torch.device,
    rounds: int = 21,
    warmup: int = 2,
    budget: float = math.inf,
) -> Samples:
    """Time the tasks in interleaved rounds, after `warmup` rounds that do not count.

    Parameters
    ----------
    tasks : mapping
        From names to tasks; a callable is a task of the single phase "all".
    device : torch.device
        On "cuda" times are those between CUDA events, elsewhere wall time.
    rounds : int
        At most; at least :data:`LEAST_ROUNDS` unless fewer are asked for.
    budget : float
        Seconds for everything. A task that has used up its equal part sits out the later rounds, so
        that one slow peer does not cost the others their rounds.

    Returns
    -------
    Samples
    """
    every = {k: t if isinstance(t, Task) else Task({"all": t}) for k, t in tasks.items()}
    samples = Samples({k: {phase: [] for phase in t.phases} for k, t in every.items()})
    spent = dict.fromkeys(every, 0.0)
    part = budget / max(1, len(every))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for k in range(warmup + rounds):
            taken: dict[str, list[Any]] = {}
            for name, task in every.items():
                # One warm-up will do for a task that is slow already.
                least = 1 if k < warmup else warmup + LEAST_ROUNDS
                if k < least or spent[name] < part:
                    begin = time.perf_counter()
                    taken[name] = _run(task, device)
                    synchronize(device)
                    spent[name] += time.perf_counter() - begin
            if k < warmup:
                continue
            for name, task in every.items():
                stamps = taken.get(name)
                for i, phase in enumerate(task.phases):
                    value = math.nan if stamps is None else _seconds(stamps[i], stamps[i + 1])
                    samples.seconds[name][phase].append(value)
            if not taken:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


def gemm_rate(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    trials: int = 7,
) -> float:
    """Flops a second of a large square matrix product: the best of `trials`.

    The limit that steps are measured against, with the threads and at the time of the run.
    """
    size = size or (8192 if device.type == "cuda" else 1536)
    A, B = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(A)

    def product() -> None:
        torch.mm(A, B, out=out)

    samples = interleave({"gemm": product}, device=device, rounds=trials)
    return 2.0 * size**3 / min(samples.values("gemm"))


def step_flops(shapes: Iterable[Shape], *, exact_metric: bool = True) -> float:
    """Flops of the thin products of one step on weights (m, n, r): the least a step can cost.

    8 (m + n) r² with the metric (SSᵀ)⁻¹, 6 (m + n) r² with a scalar one: products of a tall with a
    small matrix (2 each): removing the part along the old basis, forming the full Gram, applying
    its inverse root, and, for the exact metric, the solve with the core.
    """
    return sum((8.0 if exact_metric else 6.0) * (m + n) * r * r for m, n, r in shapes)


def share_of_limit(flops: float, rate: float, seconds: float) -> float:
    """How much of the machine's GEMM rate work of `flops` in `seconds` makes use of."""
    return flops / (rate * seconds)
