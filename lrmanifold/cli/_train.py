"""``lrmanifold train``: one network, from the folder to the results."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer

from .. import robustness, viz
from ..certify import BoundError, CertificationError
from ..checkpoint import CheckpointError
from ..experiments import models, runs
from ..experiments.adversarial import Adversarial
from ..experiments.data import Dataset
from ..experiments.factors import drawable
from ..experiments.folder import RUN_FILES
from ..experiments.methods import Method, Trained, train
from ..experiments.resume import checksums, seconds_done, steps_done
from ..experiments.training import Settings
from ..report import report as make_report
from . import _certify
from ._failures import OUT, claim_folder, fail, one_line_errors, say, write_somewhere
from ._output import accuracy_words, describe, progress_bar

# What may go wrong in the training itself and is no bug.
_WRONG = (FloatingPointError, BoundError, CheckpointError, OSError, torch.OutOfMemoryError)


@dataclasses.dataclass(frozen=True)
class Job:
    """What ``train`` was asked for, after all checks of the arguments.

    Attributes
    ----------
    folder : path
        Where results go.
    model : str
        Of :data:`lrmanifold.experiments.models.NAMES`.
    method : Method
    images : Dataset
    settings : Settings
    ranks : as in :func:`lrmanifold.factorize`, or None for "dense"
    exclude : tuple of str, or None
    device : torch.device
    strengths : tuple of float
        Of FGSM.
    save_every : int
        Steps between two checkpoints, 0 for none.
    radii : tuple of float
        l2 radii to train for and to certify; empty for plain training.
    keep_larger : bool
        Factorize also layers that get no smaller by it.
    adversarial : Adversarial or None
        The attack to train against; the network is measured under PGD at its radius, too.
    """

    folder: Path
    model: str
    method: Method
    images: Dataset
    settings: Settings
    ranks: Any
    exclude: tuple[str, ...] | None
    device: torch.device
    strengths: tuple[float, ...]
    save_every: int
    radii: tuple[float, ...] = ()
    keep_larger: bool = False
    adversarial: Adversarial | None = None

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.settings.steps(self.images)

    @property
    def checkpoint(self) -> Path:
        """The file from which a run that was cut off goes on."""
        return self.folder / "checkpoint.pt"

    def remove_checkpoint(self) -> None:
        """Where that fails it stays: nothing reads it beside results, and nothing else is lost."""
        with contextlib.suppress(OSError):
            self.checkpoint.unlink()

    def expected(self) -> dict[str, Any]:
        """The parts of ``results.json`` that are known beforehand."""
        return {
            "settings": {
                **self.settings.to_dict(),
                "data": self.images.name,
                "model": self.model,
                "method": self.method.to_dict(),
                "rank": self.ranks if self.method.kind != "dense" else None,
                "exclude": self.exclude,
                "device": str(self.device),
                **({"certified": self.radii} if self.radii else {}),
                **({"keep_larger": True} if self.keep_larger else {}),
                **({"adversarial": vars(self.adversarial)} if self.adversarial else {}),
                "eps": self.strengths,
            },
            "data": {**describe(self.images), **checksums(self.images)},
        }


def run(job: Job, *, force: bool = False) -> None:
    """Train, or go on; write the results, print them. Leaves with exit code 2 if that fails."""
    what = f"lrmanifold train, {job.method.name} on {job.images.name}"
    with claim_folder(job.folder, RUN_FILES, job.expected(), what=what, force=force) as state:
        if state == "finished":
            job.remove_checkpoint()
            typer.echo(
                f"finished already: {job.folder} has the results of these settings; --force trains "
                "again"
            )
            return
        if state == "unfinished" and not job.save_every:
            fail(
                f"{job.checkpoint} is of a run that was cut off, and without checkpoints it would "
                "be lost unread: leave --save-every 0 out to go on, choose another folder by "
                "--out, or start anew by --force"
            )
        if job.images.note:
            say(f"note: {job.images.note}")
        began = time.perf_counter() - seconds_done(job.checkpoint)
        trained = _train(job)
        _finish(job, trained, began)


def _train(job: Job) -> Trained:
    """The training; its warnings come after the bar, and not before an error, which says more."""
    done = 0

    def resumed(step: int) -> None:
        say(f"resumes after step {step} of {job.steps}, from {job.checkpoint}", err=True)

    said: list[warnings.WarningMessage] = []
    try:
        # outside: the line comes after the bar
        with (
            warnings.catch_warnings(record=True) as said,
            one_line_errors(*_WRONG, way_out=lambda error: _way_out(job, error), elsewhere=OUT),
            progress_bar(job.method.name, job.steps) as (_, advance),
        ):

            def count() -> None:
                nonlocal done
                done += 1
                advance()

            trained = train(
                job.method,
                lambda: models.build(job.model, job.images),
                job.images,
                job.ranks,
                job.settings,
                exclude=job.exclude,
                keep_larger=job.keep_larger or isinstance(job.ranks, dict),
                device=job.device,
                on_step=count,
                on_resume=resumed,
                checkpoint=job.checkpoint if job.save_every else None,
                save_every=job.save_every or 1,
                certified=_certify.ROOM * max(job.radii) if job.radii else None,
                adversarial=job.adversarial,
            )
        for words in dict.fromkeys(str(warning.message) for warning in said):
            say(f"warning: {words}", err=True)
        return trained
    except KeyboardInterrupt as error:
        where = f"stopped at step {done} of {job.steps}"
        typer.echo(f"{where}{_way_out(job, error)}", err=True)
        raise typer.Exit(130) from None


def _way_out(job: Job, error: BaseException) -> str:
    """What to do now."""
    if isinstance(error, FloatingPointError):
        job.remove_checkpoint()  # to go on from it would end the same way
        return ""
    if isinstance(error, BoundError):  # each of these models has a bound: the weights overflow
        job.remove_checkpoint()
        return f": lower lr = {job.settings.lr:g}"
    if isinstance(error, CertificationError):
        return ""  # a certificate that an attack contradicts: to go on would find the same
    if isinstance(error, CheckpointError):
        return " (--out DIR, or --force to start anew)"
    if not job.save_every:
        return "; nothing was saved, as --save-every is 0: the same command starts anew"
    step = steps_done(job.checkpoint)
    if step is None:
        return "; nothing was saved yet: the same command starts anew"
    return f"; the same command goes on after step {step}"


def _as_trained(
    model: torch.nn.Module, test: tuple[torch.Tensor, torch.Tensor], how: Adversarial
) -> dict[str, dict[str, float]]:
    """Accuracy under one step and under PGD, both in the norm and at the radius of the training."""
    many: dict[str, Any] = {"steps": 20, "generator": torch.Generator().manual_seed(0)}
    return {
        name: {
            f"{how.norm} {how.eps:.4g}": robustness.accuracy_under_attack(
                model, test, attack, (how.eps,), norm=how.norm, **options
            )[how.eps]
        }
        for name, attack, options in (
            ("one_step", robustness.fgsm, {}),
            ("pgd", robustness.pgd, many),
        )
    }


def _finish(job: Job, trained: Trained, began: float) -> None:
    """Attack the network, write everything, print the summary."""
    summary = make_report(trained.model.network)
    test = (job.images.test_x, job.images.test_y)
    accuracy = robustness.accuracy_under_attack(
        trained.model, test, robustness.fgsm, (0.0, *job.strengths)
    )
    attacked = {f"{e:.4g}": a for e, a in accuracy.items() if e}
    measured: dict[str, Any] = {"clean": accuracy[0.0], "fgsm": attacked}
    if job.adversarial is not None:
        measured |= _as_trained(trained.model, test, job.adversarial)
    results: dict[str, Any] = {
        "format": runs.FORMAT,
        **job.expected(),
        "versions": runs.versions(),
        "seconds": round(time.perf_counter() - began, 1),
        "history": dataclasses.asdict(trained.history),
        "weights_kept": trained.weights_kept,
        "inference_kept": trained.inference_kept,
        "report": summary.to_dict(),
        "accuracy": measured,
    }
    title = f"FGSM on {job.images.name}"
    figures = {"accuracy.png": viz.accuracy_curves({job.method.name: accuracy}, title=title)}
    if job.method.kind != "svd":
        spectra = trained.history.spectra.items()
        named = {name.removeprefix("network."): s for name, s in spectra}
        if shown := drawable(named):
            figures["spectra.png"] = viz.spectra(shown, tau=job.method.tau)
        if left := ", ".join(name for name in named if name not in shown):
            say(f"warning: no picture of {left}: singular values of 0, Inf or NaN", err=True)
    proof = ""
    if job.radii:
        with one_line_errors(
            BoundError, CertificationError, way_out=lambda error: _way_out(job, error)
        ):
            certified, found = _certify.certificate(trained.model.cpu(), job.images, job.radii)
        results["certificate"] = _certify.plain(certified, found)
        figures["certificate.png"] = _certify.figure(found, job.images.name)
        proof = f"{certified}\n{_certify.table(found)}"

    recipe: dict[str, Any] = {"architecture": job.model, "method": job.method, "data": job.images}
    files: dict[str, Callable[[Path], object]] = {
        **{name: partial(runs.write_figure, figure=f) for name, f in figures.items()},
        "model.pt": partial(runs.save_model, model=trained.model, **recipe),
        "results.json": partial(runs.write_results, value=results),
    }
    results["files"] = sorted(files)
    try:
        write_somewhere(job.folder, files)
        job.remove_checkpoint()
    finally:
        typer.echo(str(summary))
        typer.echo(accuracy_words(results, job.images))
        if proof:
            typer.echo(proof)
    typer.echo(f"written: {', '.join(sorted(files))} in {job.folder}")
