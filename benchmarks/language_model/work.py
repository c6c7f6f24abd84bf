"""What to run next, and several processes that share the work."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from .methods import METHODS
from .runner import SEEDS, Key, Runs, equal_time_steps, is_other, search, train, widening


def jobs(runs: Runs, busy: Collection[Key] = ()) -> Iterator[tuple[int, Key]]:
    """All runs that can start now, each with its stage; `busy` ones are on their way.

    Stages: the rates of the search, all methods at the same pace; a second seed; the run at equal
    time; the third seed; rates until the windows are closed. The other τ come a stage later.
    """
    for method in METHODS:
        for ratio in runs.ratios(method):
            known = runs.losses(method, ratio)
            mine = [key for key in busy if key[:2] == (method, ratio)]
            for stage, key in _of_case(runs, method, ratio, known, len(mine)):
                if key not in mine and runs.find(key) is None:
                    yield stage + is_other(method), key


def _of_case(
    runs: Runs, method: str, ratio: float, known: dict[float, float], on_their_way: int
) -> Iterator[tuple[int, Key]]:
    if rates := search(known, runs.guess(method, ratio)):
        stage = min(len(known) + on_their_way, 3)
        yield from ((stage, (method, ratio, lr, 0, runs.steps)) for lr in rates)
        return
    best = min(known, key=lambda rate: known[rate])
    for stage, seed in zip((4, 6), SEEDS[1:], strict=True):
        yield stage, (method, ratio, best, seed, runs.steps)
    if runs.step_ms("dense AdamW", 1.0) is not None:
        yield 5, (method, ratio, best, 0, equal_time_steps(runs, method, ratio))
    for lr in widening(known):
        yield 8, (method, ratio, lr, 0, runs.steps)


def next_job(runs: Runs, busy: Collection[Key] = (), left: float = math.inf) -> Key | None:
    """The longest run of the earliest stage among those that fit into `left` seconds."""
    waiting = [(stage, -runs.seconds(key), key) for stage, key in jobs(runs, busy)]
    return min((w for w in waiting if -w[1] < left), default=(0, 0.0, None))[2]


def work(runs: Runs, processes: int = 1, minutes: float = math.inf) -> None:
    """Run what is missing, the earliest stages first and in each the longest runs first.

    Parameters
    ----------
    runs : Runs
    processes : int
        Each of one thread. This one hands out the work and writes the lines.
    minutes : float
        Then it returns. Runs that would take longer are not begun, or given up.
    """
    until = time.time() + 60.0 * minutes
    busy: dict[Future[Any], Key] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        while True:
            while len(busy) < processes:
                key = next_job(runs, busy.values(), until - time.time())
                if key is None:
                    break
                busy[pool.submit(train, *key, width=runs.width, until=until)] = key
            if not busy:
                return
            for done in wait(busy, return_when=FIRST_COMPLETED).done:
                del busy[done]
                if (row := done.result()) is not None:
                    runs.add(row)
