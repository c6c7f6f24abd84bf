"""What the commands print: a progress bar, one line of accuracies, the table of the demo."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..experiments import demo as demos
from ..experiments.data import Dataset


@contextlib.contextmanager
def progress_bar(
    title: str, total: int
) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar on stderr; yields what renames it and what advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
    progress.start()
    try:
        task = progress.add_task(title, total=total)
        yield (
            lambda words: progress.update(task, description=words),
            lambda: progress.advance(task),
        )
    finally:
        with contextlib.suppress(OSError):  # what was computed is not lost to a full log
            progress.stop()


def describe(data: Dataset) -> dict[str, Any]:
    """What a result was measured on."""
    return {
        "name": data.name,
        "train_images": len(data.train_y),
        "test_images": len(data.test_y),
        "note": data.note,
    }


def accuracy_words(results: dict[str, Any], data: Dataset) -> str:
    """One line; with the uncertainty that so many test images leave."""
    accuracy = results["accuracy"]
    attacked = ", ".join(f"{eps}: {100 * a:.2f} %" for eps, a in accuracy["fgsm"].items())
    if "pgd" in accuracy:
        ((where, share),) = accuracy["pgd"].items()
        step = accuracy["one_step"][where]
        attacked += f"; under one step ({where}) {100 * step:.2f} %, PGD {100 * share:.2f} %"
    return (
        f"clean accuracy {100 * accuracy['clean']:.2f} %; under FGSM (linf) {attacked} "
        f"({len(data.test_y):,} test images, one is {100 / len(data.test_y):.2g} points)"
    )


def print_demo(result: demos.Comparison) -> None:
    """The table, and what one has to know to read it."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    apart = "" if console.width >= 126 else "\n"
    shown = demos.SHOWN
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), title="scikit-learn digits, accuracy in %")
    for i, head in enumerate(
        ("", "kept", "clean", *(f"FGSM\n{e:g}" for e in shown), *(f"PGD\n{e:g}" for e in shown))
    ):
        table.add_column(head, justify="right" if i else "left", no_wrap=not apart)
    table.add_column("largest\ncond", justify="right")
    columns = list(zip(*(o.cells() for o in result.outcomes), strict=True))
    best = [max((statistics.fmean(c) for c in column if c), default=0.0) for column in columns]
    for outcome in result.outcomes:
        cells = [
            _cell(runs_of, apart, top) for runs_of, top in zip(outcome.cells(), best, strict=True)
        ]
        name = outcome.method.name
        if outcome.diverged:
            name += f"\n(diverged: seed {', '.join(map(str, outcome.diverged))})"
        kept = f"{100 * outcome.inference_kept:.0f}%" if outcome.clean else "-"
        cond = f"{outcome.largest_cond:.3g}" if outcome.clean else "-"
        table.add_row(name, kept, *cells, cond)
    console.print(table)
    demo, count = result.demo, len(result.data.test_y)
    error = 50 / count**0.5
    seeds = f"seed {demo.seeds[0]}"
    if len(demo.seeds) > 1:
        seeds = f"mean ± standard deviation over seeds {', '.join(map(str, demo.seeds))}"
    for line in (
        f"{seeds} (initial weights, order of batches); best in bold. {count} test images: one is "
        f"{100 / count:.2f} points, and so few leave a standard error of up to {error:.1f} points.",
        "kept: parameters for inference, cores folded in. cond: σ_max/σ_min of the worse hidden "
        f"layer and seed, of all singular values for dense, of the {demo.rank} nonzero ones for "
        "the others (of the product A Bᵀ).",
        f"All methods: {demo.epochs} epochs, batch {demo.batch_size}, momentum {demo.momentum:g}, "
        "a cosine to 0. Attacks: linf; PGD with 20 steps and 2 runs, the first from the image.",
        _rates_words(result),
        *result.verdicts(),
    ):
        console.print(line, highlight=False, markup=False)
    console.print(f"{result.seconds:.0f} s", highlight=False)


def _rates_words(result: demos.Comparison) -> str:
    """What was tuned, for what, and what was given."""
    demo, tuned = result.demo, demos.Demo()
    rates = {o.method.name: demo.settings(o.method, demo.seeds[0]) for o in result.outcomes}
    where = "tuned for each on a validation split"
    if (demo.epochs, demo.rank) != (tuned.epochs, tuned.rank):
        where += f" (at {tuned.epochs} epochs and rank {tuned.rank})"
    if demo.lr is None:
        what = f"Learning rate and weight decay, {where}"
        chosen = {name: f"{s.lr:g}, {s.weight_decay:g}" for name, s in rates.items()}
    else:
        what = f"Learning rate {demo.lr:g} for all, as given; weight decay, {where} at other rates"
        chosen = {name: f"{s.weight_decay:g}" for name, s in rates.items()}
    values = "; ".join(f"{name} {chosen[name]}" for name in chosen if name in demos.CHOSEN)
    return f"{what}: {values}."


def _cell(accuracies: list[float], apart: str, best: float) -> str:
    if not accuracies:
        return "-"
    mean = statistics.fmean(accuracies)
    text = f"{100 * mean:.1f}"
    text = f"[bold]{text}[/bold]" if mean == best else text
    if len(accuracies) > 1:
        text += f"{apart}±{100 * statistics.stdev(accuracies):.1f}"
    return text
