"""``lrmanifold certify``, and what ``train --certified`` adds: a proof, a table, a picture."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .. import certify, robustness, viz
from .._arguments import check_number, check_text, shown
from .._files import remove_leftovers
from .._lock import LockedError, locked
from ..certify import CertificationError
from ..experiments import runs
from ..experiments.data import Dataset, load
from ..experiments.folder import certificate_files, refuse_folders
from ._failures import one_line_errors, write_somewhere
from ._output import describe, progress_bar
from ._words import check_apart, check_reach, parse_path

# l2 radii for images in [0, 1]: the usual ones of each data set
RADII = {
    "digits": (0.1, 0.2, 0.4),
    "mnist": (0.3, 1.58),
    "fashion-mnist": (0.25, 1.0),
    "cifar10": (36 / 255, 72 / 255),
}
# Trained for a little more than what is certified: test images lie less well than training ones.
ROOM = 1.2
_STEPS = 30


def parse_radii(
    words: Sequence[str], data: str, trained: Sequence[float] = ()
) -> tuple[float, ...]:
    """Radii as words, with or without commas, in increasing order.

    If none, those that the run was `trained` for; if there are none, the usual ones of the data.
    """
    parts = [part for word in words for part in str(word).replace(",", " ").split()]
    if not words:
        return tuple(trained) or RADII[data]
    try:
        found = sorted({float(part) for part in parts})
    except ValueError:
        found = []
    if not found or not all(0 < eps < float("inf") for eps in found):
        raise ValueError(f'eps must be positive numbers, as "0.3 1.58", got {" ".join(words)!r}')
    check_apart(found, 6)
    return tuple(found)


def margin(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Largest other logit over the true one, softly: attacks follow it where networks are sure."""
    own = z.gather(1, y[:, None])[:, 0]
    return z.scatter(1, y[:, None], -torch.inf).logsumexp(1) - own


def certificate(
    model: torch.nn.Module,
    data: Dataset,
    radii: Sequence[float],
    *,
    attack: bool = True,
    progress: Callable[[int], Any] | None = None,
    reach: float = 0.0,
) -> tuple[certify.LipschitzReport, dict[str, Any]]:
    """The report of the network, and what is proved and what an attack finds on the test images.

    The curve goes to 1.5 times the largest radius, or to 1.5 times `reach` if that is further.
    """
    report = certify.lipschitz(model, data.image_shape)
    options: dict[str, Any] = {}
    if attack:
        options = {
            "attack": robustness.pgd, "norm": "l2", "steps": _STEPS, "random_start": False,
            "loss": margin,
        }  # fmt: skip
    test = (data.test_x, data.test_y)
    found = certify.verified_accuracy(
        model, test, radii, bound=report, progress=progress, **options
    )
    curve = [max(*radii, reach) * 1.5 * k / 40 for k in range(41)]
    found["curve"] = certify.verified_accuracy(model, test, curve, bound=report)["verified"]
    return report, found


def figure(found: dict[str, Any], name: str) -> Any:
    """Verified accuracy over the radius, the attacked one above it; keys are numbers or words."""

    def numbers(shares: dict[Any, float]) -> dict[float, float]:
        return {float(eps): share for eps, share in shares.items()}

    curves: dict[str, Any] = {"proved": numbers(found["curve"])}
    if "attacked" in found:
        curves["under PGD"] = {0.0: found["clean"], **numbers(found["attacked"])}
    return viz.accuracy_curves(
        curves,
        title=f"Certificate on {name}",
        xlabel="l2 radius (pixels are in 0..1)",
    )


def table(found: dict[str, Any]) -> str:
    """The certificate in a few lines of text."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for head in (
        "l2 radius",
        "clean %",
        "proved %",
        *(["under PGD %"] if "attacked" in found else []),
    ):
        shown.add_column(head, justify="right")
    for eps, share in found["verified"].items():
        cells = [f"{eps:.4g}", f"{100 * found['clean']:.2f}", f"{100 * share:.2f}"]
        if "attacked" in found:
            cells.append(f"{100 * found['attacked'][eps]:.2f}")
        shown.add_row(*cells)
    console = Console(width=100, file=io.StringIO())
    console.print(shown)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    radius = found["radius"]
    return (
        f"{text.rstrip()}\n{found['count']:,} test images; proved radius: median "
        f"{radius['median']:.4g}, mean {radius['mean']:.4g}. Proved for the network in exact "
        "arithmetic and in float64, not for a float32 forward within 1e-6 of the boundary."
    )


def plain(report: certify.LipschitzReport, found: dict[str, Any]) -> dict[str, Any]:
    """For JSON: keys are words."""

    def named(shares: dict[float, float]) -> dict[str, float]:
        return {f"{eps:.6g}": share for eps, share in shares.items()}

    shown = {**found, "verified": named(found["verified"]), "curve": named(found["curve"])}
    if "attacked" in found:
        shown["attacked"] = named(found["attacked"])
        shown["attack"] = f"l2 PGD from the image, {_STEPS} steps on the margin"
    return {**shown, "lipschitz": report.to_dict()}


def earlier(path: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Certificates that a run has already, as :func:`plain` wrote them, the latest last.

    Raises
    ------
    ValueError
        If one is damaged: to write another over it would lose its radii.
    """
    found = []
    if (own := results.get("certificate")) is not None:
        where = path.with_name("results.json")
        try:
            found.append(_checked(own))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: its certificate is damaged ({error})") from error
    if os.path.lexists(path):
        try:
            found.append(_checked(json.loads(path.read_bytes())))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: is damaged ({error}): remove it, and certify its radii again"
            ) from error
    return found


def _checked(old: Any) -> dict[str, Any]:
    """Refuse what :func:`joined` cannot join."""
    if not isinstance(old, dict):
        raise TypeError(f"it must be an object with certified radii, got {shown(old)}")
    for key in ("verified", "attacked"):
        shares = old.get(key, None if key == "verified" else {})
        if not isinstance(shares, dict):
            raise TypeError(f"{key} must be an object of accuracies, got {shown(shares)}")
        for eps, share in shares.items():
            check_number(f"a radius in {key}", _number(eps), low=0.0, open_low=True)
            check_number(f"{key} at {eps}", share, low=0.0, high=1.0)
    for key in _SAME:
        if old.get(key) is not None:
            check_number(key, old[key])
    check_text("attack", old.get("attack", "none"))
    return old


def _number(word: str) -> Any:
    """A word as the number that it stands for, or as it is."""
    try:
        return float(word)
    except ValueError:
        return word


# Two certificates that share these are of one network and the same images.
_SAME = ("clean", "count", "bound")


def joined(new: dict[str, Any], before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`new` with the radii of earlier certificates of the same network and images."""
    parts = [old for old in before if all(_close(old.get(key), new[key]) for key in _SAME)]
    out = dict(new)
    for key in ("verified", "attacked"):
        shares = {e: share for part in [*parts, new] for e, share in part.get(key, {}).items()}
        if shares:
            out[key] = dict(sorted(shares.items(), key=lambda item: float(item[0])))
    with_attack = [part["attack"] for part in [*parts, new] if "attack" in part]
    return {**out, **({"attack": with_attack[-1]} if with_attack else {})}


def _close(a: Any, b: float) -> bool:
    return isinstance(a, (int, float)) and math.isclose(a, b, rel_tol=1e-6)


def _trained_on(results: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
    """The data set of a run and the radii that it was trained for.

    The settings of a demo do not name its data.
    """
    settings, data = results.get("settings"), results.get("data")
    settings, data = (part if isinstance(part, dict) else {} for part in (settings, data))
    name, radii = settings.get("data") or data.get("name"), settings.get("certified", ())
    if not isinstance(name, str) or not isinstance(radii, (list, tuple)):
        raise ValueError("results.json is damaged: it must name a data set and its radii, if any")
    return name, tuple(check_number("a radius in results.json", eps, low=0.0) for eps in radii)


def certify_command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="folder of a run, or its model.pt")],
    more: Annotated[
        list[str] | None, typer.Argument(help="further radii", show_default=False)
    ] = None,
    eps: Annotated[
        list[str] | None,
        typer.Option(
            help='l2 radii, as "--eps .3 1.58" or "--eps .3,1.58"; by default those that the run '
            "was trained for, else the usual ones of its data"
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="data set, if not the one that the run was trained on")
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="folder of the data; else the variable LRMANIFOLD_DATA"),
    ] = None,
    attack: Annotated[
        bool, typer.Option(metavar="", help="also attack, and check the proof by it")
    ] = True,
) -> None:
    """Prove which test images no small change can move into another class.

    Prints the Lipschitz bound of every layer and the verified accuracy at each l2 radius, and
    writes certificate.json and certificate.png into the folder of the run. Radii certified before
    stay in the files. With --data they are called certificate-DATA.json and certificate-DATA.png.
    """
    with one_line_errors():
        run = parse_path("path", path)
        where = None if root is None else parse_path("root", root)
    folder = run if os.path.isdir(run) else run.parent
    with contextlib.ExitStack() as stack:
        with one_line_errors(OSError, LockedError, elsewhere=_COPY):
            if os.path.isdir(folder):  # else the model is missed, which says more
                stack.enter_context(locked(folder, "lrmanifold certify"))
        _certify(run, folder, [*(eps or []), *(more or [])], data, where, attack)


# What to do about a folder that cannot be written.
_COPY = "copy model.pt and results.json to another folder, and certify that"


def _certify(
    path: Path, folder: Path, words: list[str], data: str | None, root: Path | None, attack: bool
) -> None:
    """:func:`certify_command` in a folder that is held: nobody writes another network there."""
    with one_line_errors():
        model = runs.load_model(path)
        results = runs.load_results(folder)
        own, trained = _trained_on(results)
        name = own if data is None else data
        if name not in RADII:
            raise ValueError(f"data must be one of {', '.join(RADII)}, got {name!r}")
        images = load(name, root)
        radii = parse_radii(words, name, trained if name == own else ())
        check_reach(radii, "l2", images.image_shape)
        files = certificate_files(None if name == own else name)
        for file in files:
            remove_leftovers(folder / file)
        refuse_folders(folder, files)
        before = earlier(folder / files[0], results if name == own else {})
        viz.need_matplotlib()
        count = len(images.test_y)
    reach = max((float(e) for old in before for e in old["verified"]), default=0.0)
    with (
        one_line_errors(certify.BoundError, CertificationError),
        progress_bar("certify", -(-count // 500)) as (_, advance),
    ):
        report, found = certificate(
            model, images, radii, attack=attack, progress=lambda done: advance(), reach=reach
        )
    new = plain(report, found)
    whole = joined(new, before)
    written = {"versions": runs.versions(), "data": describe(images), **whole}
    try:  # first: a reader of the output may leave
        write_somewhere(
            folder,
            {
                files[0]: partial(runs.write_json, value=written),
                files[1]: partial(runs.write_figure, figure=figure(whole, name)),
            },
            elsewhere=_COPY,
        )
    finally:
        typer.echo(str(report))
        typer.echo(table(found))
        if not any(found["verified"].values()):
            typer.echo(
                "Nothing is proved at these radii: give smaller ones by --eps, or train for "
                "proofs, lrmanifold train --certified."
            )
    kept = [eps for eps in whole["verified"] if eps not in new["verified"]]
    lost = {eps for old in before for eps in old["verified"]} - set(whole["verified"])
    note = f"; radii of before are kept: {', '.join(kept)}" if kept else ""
    if lost:
        note = "; an earlier certificate was of another network, its radii are left out: " + (
            ", ".join(sorted(lost, key=float))
        )
    typer.echo(f"written: {', '.join(files)} in {folder}{note}")
