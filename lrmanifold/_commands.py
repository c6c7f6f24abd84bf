"""The commands of :mod:`lrmanifold.cli`, with typer and rich."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import robustness, viz
from ._words import (
    check_some_layer,
    check_word,
    make_folder,
    parse_device,
    parse_layers,
    parse_method,
    parse_strengths,
    run_name,
)
from .checkpoint import CheckpointError
from .experiments import demo as demos
from .experiments import models, runs
from .experiments.data import Dataset, load
from .experiments.methods import Method, train
from .experiments.training import Settings
from .nn.plan import make_plan
from .report import report as make_report

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# linf radii for images in [0, 1]: where the networks of this library begin to err
STRENGTHS = {
    "digits": (0.05, 0.1, 0.15),
    "mnist": (0.02, 0.04, 0.06),
    "fashion-mnist": (0.01, 0.02, 0.04),
    "cifar10": (2 / 255, 4 / 255, 8 / 255),
}


@app.callback()
def lrmanifold() -> None:
    """Robust low-rank training: well-conditioned fixed-rank weights on Riemannian manifolds."""


@app.command("train")
def train_command(
    data: Annotated[str, typer.Option(help="digits, mnist, fashion-mnist or cifar10")] = "digits",
    root: Annotated[
        Path | None, typer.Option(help="folder of the data; else the variable LRMANIFOLD_DATA")
    ] = None,
    model: Annotated[str, typer.Option(help="mlp or lenet5")] = "mlp",
    method: Annotated[
        str, typer.Option(help="condlr, dense, factors (A Bᵀ by SGD) or svd (dense, then cut)")
    ] = "condlr",
    rank: Annotated[
        str | None,
        typer.Option(help='"32", a share "0.2" (the default) or "conv1=4,conv2=10,fc1=100"'),
    ] = None,
    tau: Annotated[
        str | None, typer.Option(help='condlr: cond <= 1 + tau, 0.1 by default; "none": no bound')
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help='layers that stay dense (patterns); "none" for no layer. The default is the last '
            "layer, which gives the class scores, unless --rank names layers"
        ),
    ] = None,
    epochs: int = 10,
    batch_size: int = 128,
    lr: Annotated[float, typer.Option(help="at the start; follows a cosine to 0")] = 0.1,
    momentum: float = 0.3,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    eps: Annotated[
        str | None, typer.Option(help='strengths of FGSM (linf), as "0.02,0.04"')
    ] = None,
    save_every: Annotated[
        int, typer.Option(min=0, help="steps between two checkpoints, 0 for none")
    ] = 100,
    out: Annotated[Path | None, typer.Option(help="folder; runs/<name> by default")] = None,
) -> None:
    """Train a network and write results.json, model.pt and pictures.

    A run that was cut off goes on from its last checkpoint when it is called again.
    """
    with one_line_errors():
        check_word("data", data, STRENGTHS)
        check_word("model", model, models.NAMES)
        how = parse_method(method, tau)
        settings = Settings(epochs, batch_size, lr, momentum, seed)
        where = parse_device(device)
        images = load(data, root)
        network = models.build(model, images)
        ranks, dense_layers = parse_layers(how, network, rank, exclude)
        strengths = STRENGTHS[data] if eps is None else parse_strengths(eps)
        folder = out or Path("runs") / run_name(data, model, how, seed)
        viz.need_matplotlib()
        make_folder(folder)
    if images.note:
        typer.echo(f"note: {images.note}")
    began = time.perf_counter()
    steps = epochs * -(-len(images.train_y) // batch_size)
    kept = folder / "checkpoint.pt"
    wrong = (FloatingPointError, CheckpointError)
    with progress_bar(how.name, steps) as (_, advance), one_line_errors(*wrong):
        trained = train(
            how,
            lambda: models.build(model, images),
            images,
            ranks,
            settings,
            exclude=dense_layers,
            keep_larger=isinstance(ranks, dict),
            device=where,
            on_step=advance,
            checkpoint=kept if save_every else None,
            save_every=save_every or 1,
        )
    summary = make_report(trained.model.network)
    test = (images.test_x, images.test_y)
    accuracy = robustness.accuracy_under_attack(
        trained.model, test, robustness.fgsm, (0.0, *strengths)
    )
    results: dict[str, Any] = {
        "format": runs.FORMAT,
        "settings": {
            **dataclasses.asdict(settings),
            "data": data,
            "model": model,
            "method": dataclasses.asdict(how),
            "rank": ranks if how.kind != "dense" else None,
            "exclude": dense_layers,
            "device": str(where),
        },
        "versions": runs.versions(),
        "data": describe(images),
        "seconds": round(time.perf_counter() - began, 1),
        "history": dataclasses.asdict(trained.history),
        "weights_kept": trained.weights_kept,
        "inference_kept": trained.inference_kept,
        "report": summary.to_dict(),
        "accuracy": {
            "clean": accuracy[0.0],
            "fgsm": {f"{e:.4g}": a for e, a in accuracy.items() if e},
        },
    }
    figures = {"accuracy.png": viz.accuracy_curves({how.name: accuracy}, title=f"FGSM on {data}")}
    if trained.history.spectra and how.kind != "svd":
        spectra = trained.history.spectra.items()
        named = {name.removeprefix("network."): s for name, s in spectra}
        figures["spectra.png"] = viz.spectra(named, tau=how.tau)
    with one_line_errors(OSError):
        for name, figure in figures.items():
            runs.write_figure(folder / name, figure)
        path = folder / "model.pt"
        runs.save_model(path, trained.model, architecture=model, method=how, data=images)
        runs.write_json(folder / "results.json", results)
        kept.unlink(missing_ok=True)
    typer.echo(str(summary))
    typer.echo(accuracy_words(results, images))
    typer.echo(f"written: {', '.join(sorted(p.name for p in folder.iterdir()))} in {folder}")


@app.command("report")
def report_command(
    path: Annotated[Path, typer.Argument(help="folder of a run, or its model.pt")],
) -> None:
    """Print the layers of a trained network: ranks, singular values, conditioning, size."""
    with one_line_errors():
        model = runs.load_model(path)
        typer.echo(str(make_report(model.network)))


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="the first seed")] = 0,
    seeds: Annotated[int, typer.Option(help="runs of every method", min=1)] = len(demos.Demo.seeds),
    epochs: Annotated[int, typer.Option(min=1)] = demos.Demo.epochs,
    rank: Annotated[int, typer.Option(min=1, help="of both hidden layers")] = demos.Demo.rank,
    lr: Annotated[float, typer.Option(help="of all methods")] = demos.Demo.lr,
) -> None:
    """Compare dense, truncated, plain low-rank and CondLR networks on scikit-learn's digits."""
    with one_line_errors():
        chosen = tuple(range(seed, seed + seeds))
        plan = demos.Demo(seeds=chosen, epochs=epochs, rank=rank, lr=lr)
        images = demos.load("digits")
        network = models.build("mlp", images)
        check_some_layer(make_plan(network, rank=rank, exclude=demos.EXCLUDE), rank)
        plan.settings(seed)
        viz.need_matplotlib()
        make_folder(out)
    # matrices this small are no faster on several threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress_bar("demo", plan.steps(images)) as (say, advance):
            result = demos.run(plan, on_start=say, on_step=advance)
    finally:
        torch.set_num_threads(threads)
    with one_line_errors(OSError):
        for name, figure in demos.pictures(result).items():
            runs.write_figure(out / name, figure)
        if result.example is not None:
            how = Method("CondLR tau=0.1", "condlr", 0.1)
            model = result.example.model
            runs.save_model(out / "model.pt", model, architecture="mlp", method=how, data=images)
        results = {"format": "lrmanifold demo, version 1", "versions": runs.versions()}
        runs.write_json(out / "results.json", {**results, **result.to_dict()})
    print_demo(result)
    typer.echo(f"written to {out}: results.json, accuracy.png, spectra.png, model.pt (tau = 0.1)")


# ------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """What a user got wrong is one line and exit code 2; by default for the checks of arguments.

    Training runs outside, or inside for a named error only: a bug there must show its traceback.
    """
    wrong = kinds or (ValueError, TypeError, OSError, ImportError)
    try:
        yield
    except wrong as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(2) from None


# ------------------------------------------------------------------------------------- output


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
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        task = progress.add_task(title, total=total)
        yield (
            lambda words: progress.update(task, description=words),
            lambda: progress.advance(task),
        )


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
    for line in (
        f"mean ± standard deviation over seeds {', '.join(map(str, demo.seeds))} (initial weights, "
        f"order of batches); best mean in bold. {count} test images: one is {100 / count:.2f} "
        f"points, and so few leave a standard error of up to {error:.1f} points.",
        "kept: parameters for inference, cores folded in. cond: σ_max/σ_min of the worse hidden "
        f"layer and seed, of all singular values for dense, of the {demo.rank} nonzero ones for "
        "the others (of the product A Bᵀ).",
        f"All methods: {demo.epochs} epochs, batch {demo.batch_size}, lr {demo.lr:g} with a cosine "
        f"to 0, momentum {demo.momentum:g}. Attacks: linf; PGD with 20 steps on cross entropy, "
        "then on the margin.",
        *result.verdicts(),
    ):
        console.print(line, highlight=False, markup=False)
    console.print(f"{result.seconds:.0f} s", highlight=False)


def _cell(accuracies: list[float], apart: str, best: float) -> str:
    if not accuracies:
        return "-"
    mean = statistics.fmean(accuracies)
    text = f"{100 * mean:.1f}"
    text = f"[bold]{text}[/bold]" if mean == best else text
    if len(accuracies) > 1:
        text += f"{apart}±{100 * statistics.stdev(accuracies):.1f}"
    return text
