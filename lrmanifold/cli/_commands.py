"""The commands of :mod:`lrmanifold.cli`, with typer and rich."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import viz
from ..experiments import demo as demos
from ..experiments import models, runs
from ..experiments.data import Dataset, load
from ..experiments.folder import DEMO_FILES
from ..experiments.methods import Method, comparison
from ..experiments.training import Settings
from ..nn.plan import make_plan
from ..report import report as make_report
from ._certify import certify_command, parse_radii
from ._failures import claim_folder, one_line_errors, write_somewhere
from ._output import describe, print_demo, progress_bar
from ._train import Job, run
from ._words import (
    check_reach,
    check_some_layer,
    check_word,
    parse_adversarial,
    parse_device,
    parse_layers,
    parse_method,
    parse_optimizer,
    parse_path,
    parse_strengths,
    run_name,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

# typer shows the metavar of flags as <bool>, though they take no value
_FLAG = ""

Force = Annotated[
    bool, typer.Option("--force", metavar=_FLAG, help="overwrite what is in the folder")
]

# linf radii for images in [0, 1]: where the networks of this library begin to err
STRENGTHS = {
    "digits": (0.05, 0.1, 0.15),
    "mnist": (0.02, 0.04, 0.06),
    "fashion-mnist": (0.01, 0.02, 0.04),
    "cifar10": (2 / 255, 4 / 255, 8 / 255),
}


def print_version(wanted: bool) -> None:
    """The version, and nothing else."""
    if wanted:
        typer.echo(f"lrmanifold {runs.versions()['lrmanifold']}")
        raise typer.Exit


@app.callback()
def lrmanifold(
    version: Annotated[
        bool, typer.Option("--version", metavar=_FLAG, callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Robust low-rank training: well-conditioned fixed-rank weights on Riemannian manifolds."""


@app.command("train")
def train_command(
    data: Annotated[str, typer.Option(help="digits, mnist, fashion-mnist or cifar10")] = "digits",
    root: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="folder of the data; else the variable LRMANIFOLD_DATA"),
    ] = None,
    model: Annotated[str, typer.Option(help="mlp, mlp-maxmin, lenet5 or plain")] = "mlp",
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
    compression: Annotated[
        float | None,
        typer.Option(help="in place of --rank: share of all weights to remove, as 0.8"),
    ] = None,
    keep_larger: Annotated[
        bool,
        typer.Option(
            "--keep-larger",
            metavar=_FLAG,
            help="factorize layers also where that saves nothing",
        ),
    ] = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help='layers that stay dense (patterns); "none" for no layer. The default is the last '
            "layer, which gives the class scores, unless --rank names layers"
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="condlr (the default; SGD on ordinary parameters) or adam (CondLRAdam, AdamW; "
            "always with --certified)"
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="10 by default, 60 for the few digits by condlr")
    ] = None,
    batch_size: int = 128,
    lr: Annotated[
        float | None,
        typer.Option(help="at the start, 0.1 by default, 0.01 with adam; a cosine to 0"),
    ] = None,
    momentum: Annotated[
        float | None, typer.Option(help="of --optimizer condlr alone, 0.3 by default")
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(help="of matrices; on a low-rank weight it acts on the core")
    ] = 0.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    eps: Annotated[
        list[str] | None,
        typer.Option(help='strengths of FGSM (linf), as "0.02,0.04"; --certified: l2 radii'),
    ] = None,
    adversarial: Annotated[
        str | None,
        typer.Option(
            help='train on attacked images: "linf" or "l2" by PGD, "linf-trades", "linf-single" '
            "(one step); --eps is the radius"
        ),
    ] = None,
    certified: Annotated[
        bool,
        typer.Option(
            "--certified", metavar=_FLAG, help="train for proofs by Adam; tau is 0 by default"
        ),
    ] = False,
    save_every: Annotated[
        int, typer.Option(min=0, help="steps between two checkpoints, 0 for none")
    ] = 100,
    out: Annotated[
        str | None, typer.Option(metavar="PATH", help="folder; runs/NAME by default")
    ] = None,
    force: Force = False,
) -> None:
    """Train a network and write results.json, model.pt and pictures.

    A run that was cut off goes on from its last checkpoint when it is called again. A folder with
    other results or files is left alone.
    """
    with one_line_errors():
        check_word("data", data, STRENGTHS)
        check_word("model", model, models.NAMES)
        how = parse_method(method, "0" if certified and tau is None and method == "condlr" else tau)
        rule = parse_optimizer(optimizer, certified)
        if rule == "adam" and momentum is not None:
            raise ValueError(f"momentum belongs to optimizer condlr, got {momentum:g} with adam")
        rate = (0.01 if rule == "adam" else 0.1) if lr is None else lr
        # ten epochs of the digits are 120 steps, too few for SGD
        rounds = 60 if data == "digits" and rule == "sgd" else 10
        settings = Settings(
            rounds if epochs is None else epochs,
            batch_size,
            rate,
            Settings.momentum if momentum is None else momentum,
            seed,
            rule,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
        )
        if certified and label_smoothing:
            raise ValueError(
                f"label_smoothing must be 0 with certified, whose loss has none: {label_smoothing}"
            )
        where = parse_device(device)
        images = load(data, None if root is None else parse_path("root", root))
        network = models.build(model, images)
        ranks, dense_layers = parse_layers(
            how, network, rank, exclude, compression=compression, keep_larger=keep_larger
        )
        radii = parse_radii(eps or (), data) if certified else ()
        attack = parse_adversarial(adversarial, eps, certified)
        apart = certified or (attack is not None and attack.norm == "l2")  # no radii of FGSM
        given = None if apart or eps is None else ",".join(eps)
        strengths = STRENGTHS[data] if given is None else parse_strengths(given)
        check_reach(strengths, "linf", images.image_shape)
        check_reach(radii, "l2", images.image_shape)
        if attack is not None:
            check_reach([attack.eps], attack.norm, images.image_shape)
        name = run_name(data, model, how, seed) + ("-certified" if certified else "")
        name += f"-{adversarial}{attack.eps:g}" if attack is not None else ""
        folder = Path("runs") / name if out is None else parse_path("out", out)
        viz.need_matplotlib()
    job = Job(
        folder,
        model,
        how,
        images,
        settings,
        ranks,
        dense_layers,
        where,
        strengths,
        save_every,
        radii,
        keep_larger,
        attack,
    )
    run(job, force=force)


@app.command("report")
def report_command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="folder of a run, or its model.pt")],
    json: Annotated[
        bool, typer.Option("--json", metavar=_FLAG, help="all numbers as JSON")
    ] = False,
    wide: Annotated[
        bool, typer.Option("--wide", metavar=_FLAG, help="all columns of the table")
    ] = False,
) -> None:
    """Print the layers of a trained network: ranks, singular values, conditioning, size."""
    with one_line_errors():
        found = make_report(runs.load_model(parse_path("path", path)).network, wide=wide)
        typer.echo(found.to_json() if json else str(found))


app.command("certify")(certify_command)


@app.command("demo")
def demo_command(
    out: Annotated[str, typer.Option(metavar="PATH", help="folder to write to")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="the first seed")] = 0,
    seeds: Annotated[int, typer.Option(help="runs of every method", min=1)] = len(demos.Demo.seeds),
    epochs: Annotated[int, typer.Option(min=1)] = demos.Demo.epochs,
    rank: Annotated[int, typer.Option(min=1, help="of both hidden layers")] = demos.Demo.rank,
    lr: Annotated[
        float | None, typer.Option(help="one rate for all; by default each has its own, tuned")
    ] = None,
    force: Force = False,
) -> None:
    """Compare dense, truncated, plain low-rank and CondLR networks on scikit-learn's digits."""
    with one_line_errors():
        folder = parse_path("out", out)
        chosen = tuple(range(seed, seed + seeds))
        plan = demos.Demo(seeds=chosen, epochs=epochs, rank=rank, lr=lr)
        images = demos.load("digits")
        network = models.build("mlp", images)
        check_some_layer(make_plan(network, rank=rank, exclude=demos.EXCLUDE), rank)
        for each, method in itertools.product(chosen, comparison()):
            plan.settings(method, each)
        viz.need_matplotlib()
        expected = {"settings": dataclasses.asdict(plan), "data": describe(images)}
    with claim_folder(folder, DEMO_FILES, expected, what="lrmanifold demo", force=force) as state:
        if state == "finished":
            typer.echo(
                f"finished already: the results are in {folder}; --force runs the demo again"
            )
            return
        run_demo(plan, images, folder)


def run_demo(plan: demos.Demo, images: Dataset, out: Path) -> None:
    """Train everything, write it to a folder that is held, print the table."""
    # matrices this small are no faster on several threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress_bar("demo", plan.steps(images)) as (say, advance):
            result = demos.run(plan, on_start=say, on_step=advance)
    except KeyboardInterrupt:
        typer.echo("stopped; the demo saves nothing on its way: it starts anew", err=True)
        raise typer.Exit(130) from None
    finally:
        torch.set_num_threads(threads)
    figures = demos.pictures(result)
    results = {"format": runs.DEMO_FORMAT, "versions": runs.versions(), **result.to_dict()}
    files: dict[str, Callable[[Path], object]] = {
        name: partial(runs.write_figure, figure=figure) for name, figure in figures.items()
    }
    if result.example is not None:
        how = Method("CondLR tau=0.1", "condlr", 0.1)
        recipe: dict[str, Any] = {"architecture": "mlp", "method": how, "data": images}
        files["model.pt"] = partial(runs.save_model, model=result.example.model, **recipe)
    results["files"] = sorted([*files, "results.json"])
    files["results.json"] = partial(runs.write_results, value=results)
    try:
        write_somewhere(out, files)
    finally:
        print_demo(result)
    note = "model.pt: tau = 0.1" if "model.pt" in files else "no model.pt: tau = 0.1 diverged"
    typer.echo(f"written to {out}: {', '.join(sorted(files))} ({note})")
