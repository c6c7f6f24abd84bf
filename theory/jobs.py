"""Claims one after the other, or several at once in processes of their own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .core import Claim
from .mutation import constants, mutate
from .runner import Settings, verify, verify_control

Kind = Literal["claims", "controls", "mutate"]


@dataclass(frozen=True)
class Task:
    """One claim, one of its controls, or one of its constants."""

    kind: Kind
    id: str
    part: str | int = ""


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tasks(claims: Sequence[Claim], kind: Kind) -> list[Task]:
    """What there is to do."""
    if kind == "controls":
        return [Task(kind, c.id, k) for c in claims for k in range(len(c.controls))]
    if kind == "mutate":
        return [Task(kind, c.id, name) for c in claims for name in constants(c)]
    return [Task(kind, c.id) for c in claims]


def run_one(task: Task, claim: Claim, settings: Settings) -> Any:
    """The verdict of one task."""
    if task.kind == "controls":
        assert isinstance(task.part, int)
        return verify_control(claim, claim.controls[task.part], settings)
    if task.kind == "mutate":
        return mutate(claim, str(task.part), settings)
    return verify(claim, settings)


def _in_process(task: Task, settings: Settings) -> Any:
    from .catalogue import find

    return run_one(task, find(task.id), settings)


def _prepare() -> None:
    # Matrices are tiny: one thread is faster, and the same numbers come out on every machine.
    torch.set_num_threads(1)


def run(
    todo: Sequence[Task],
    claims: Sequence[Claim],
    settings: Settings,
    *,
    jobs: int = 1,
    on_done: Callable[[Task], None] = lambda task: None,
) -> list[Any]:
    """The verdicts, in the order of the tasks.

    With more than one job the claims are found by their id in each process, so they must be those
    of the collection; on an accelerator, and for one task, everything stays here.
    """
    if jobs < 2 or len(todo) < 2 or settings.device.type != "cpu":
        return list(_here(todo, claims, settings, on_done))
    results: dict[Task, Any] = {}
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(jobs, len(todo)), context, initializer=_prepare) as pool:
        try:
            with _ignored_by_children():
                futures = {pool.submit(_in_process, t, settings): t for t in _slow_first(todo)}
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                on_done(futures[future])
        except BaseException:
            # The pool would finish all that was submitted first.
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
    return [results[task] for task in todo]


@contextlib.contextmanager
def _ignored_by_children() -> Iterator[None]:
    """Ctrl-C reaches the processes started here, too: only this one is to speak of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _slow_first(todo: Sequence[Task]) -> list[Task]:
    """Trajectories take longest: begun last, one of them would end the run alone."""
    return sorted(todo, key=lambda t: t.id.split("/")[0] not in ("training", "approximation"))


def _here(
    todo: Sequence[Task],
    claims: Sequence[Claim],
    settings: Settings,
    on_done: Callable[[Task], None],
) -> Iterator[Any]:
    known = {claim.id: claim for claim in claims}
    for task in todo:
        yield run_one(task, known[task.id], settings)
        on_done(task)
