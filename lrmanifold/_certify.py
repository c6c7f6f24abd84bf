"""``lrmanifold certify``, and what ``train --certified`` adds: a proof, a table, a picture."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from . import certify, robustness, viz
from ._failures import one_line_errors
from ._output import describe, progress_bar
from ._words import check_reach
from .certify import CertificationError
from .experiments import runs
from .experiments.data import Dataset, load

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
    if not parts:
        return tuple(trained) or RADII[data]
    try:
        found = sorted({float(part) for part in parts})
    except ValueError:
        found = []
    if not found or not all(0 < eps < float("inf") for eps in found):
        raise ValueError(f'eps must be positive numbers, as "0.3 1.58", got {" ".join(words)!r}')
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
    """Certificates that a run has already, as :func:`plain` wrote them, the latest last."""
    found = [results.get("certificate")]
    with contextlib.suppress(OSError, ValueError):
        found.append(json.loads(path.read_bytes()))
    return [old for old in found if isinstance(old, dict) and isinstance(old.get("verified"), dict)]


def joined(new: dict[str, Any], before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`new` with the radii of earlier certificates of the same network and images."""
    same = ("clean", "count", "bound")
    parts = [old for old in before if all(_close(old.get(key), new[key]) for key in same)]
    out = dict(new)
    for key in ("verified", "attacked"):
        shares = {e: share for part in [*parts, new] for e, share in part.get(key, {}).items()}
        if shares:
            out[key] = dict(sorted(shares.items(), key=lambda item: float(item[0])))
    with_attack = [part["attack"] for part in [*parts, new] if "attack" in part]
    return {**out, **({"attack": with_attack[-1]} if with_attack else {})}


def _close(a: Any, b: float) -> bool:
    return isinstance(a, (int, float)) and math.isclose(a, b, rel_tol=1e-6)


def _data_of(results: dict[str, Any]) -> str:
    """The data set of a run, also of the demo's, whose settings do not name it."""
    return results["settings"].get("data") or results["data"]["name"]


def certify_command(
    path: Annotated[Path, typer.Argument(help="folder of a run, or its model.pt")],
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
        Path | None, typer.Option(help="folder of the data; else the variable LRMANIFOLD_DATA")
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
    with one_line_errors(ValueError, TypeError, OSError, ImportError):
        model = runs.load_model(path)
        folder = path if path.is_dir() else path.parent
        results = runs.load_results(folder)
        own = _data_of(results)
        name = data or own
        if name not in RADII:
            raise ValueError(f"data must be one of {', '.join(RADII)}, got {name!r}")
        images = load(name, root)
        trained = results["settings"].get("certified", ()) if name == own else ()
        radii = parse_radii([*(eps or []), *(more or [])], name, trained)
        check_reach(radii, "l2", images.image_shape)
        stem = "certificate" if name == own else f"certificate-{name}"
        before = earlier(folder / f"{stem}.json", results if name == own else {})
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
    typer.echo(str(report))
    typer.echo(table(found))
    if not any(found["verified"].values()):
        typer.echo(
            "Nothing is proved at these radii: give smaller ones by --eps, or train for proofs, "
            "lrmanifold train --certified."
        )
    new = plain(report, found)
    whole = joined(new, before)
    with one_line_errors(OSError):
        runs.write_json(
            folder / f"{stem}.json",
            {"versions": runs.versions(), "data": describe(images), **whole},
        )
        runs.write_figure(folder / f"{stem}.png", figure(whole, name))
    kept = [eps for eps in whole["verified"] if eps not in new["verified"]]
    lost = {eps for old in before for eps in old["verified"]} - set(whole["verified"])
    note = f"; radii of before are kept: {', '.join(kept)}" if kept else ""
    if lost:
        note = "; an earlier certificate was of another network, its radii are left out: " + (
            ", ".join(sorted(lost, key=float))
        )
    typer.echo(f"written: {stem}.json, {stem}.png in {folder}{note}")
