"""Progress on a terminal by rich; plain lines where the output is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display:
    """Two bars: all runs, and the batches of the present one."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet)
        live = self.console.is_terminal and not quiet
        self.progress = Progress(
            TextColumn("{task.description}", justify="left"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not live,
        )
        self.all: Any = None
        self.one: Any = None
        self._began = time.monotonic()

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def start(self, total: int, done: int) -> None:
        """Say how many runs there are."""
        self.log(f"{total} runs, {done} of them done before")
        self.all = self.progress.add_task("all runs", total=total, completed=done)
        self.one = self.progress.add_task("", total=None)

    def begin(self, name: str) -> None:
        """A run begins."""
        self.progress.reset(self.one, description=name, total=None)

    def batch(self, done: int, total: int) -> None:
        """A batch is done."""
        self.progress.update(self.one, completed=min(done, total), total=total)

    def finish_run(self) -> None:
        """A run is in the table."""
        self.progress.advance(self.all)

    def log(self, text: str) -> None:
        """A line above the bars, with the minutes since the beginning."""
        minutes = (time.monotonic() - self._began) / 60
        self.console.print(f"{minutes:6.1f} min  {text}", highlight=False)
