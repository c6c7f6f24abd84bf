"""What a run is shown and stored as: tables, JSON, pictures."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .core import Claim
from .runner import ControlVerdict, Settings, Verdict

#: Printed after every run, so that nobody takes the table for more than it is.
NOT_COVERED = (
    "Not covered by any claim: stochastic gradients, momentum, rounding of a whole flow in "
    "float32, train-mode batch norm, max-pool, softmax, and the condition number of low-rank "
    "convolutions as operators. See theory/README.md."
)

KINDS = (
    "ratio: measured/bound for an inequality (1: attained); deviation/rounding tolerance for "
    "an identity (=); deviation of a slope/what is allowed for an order (t^p)."
)
_MARK = {"inequality": "<=", "identity": "=", "order": "t^p"}


def _short(x: float) -> str:
    if math.isnan(x):
        return "-"
    if x == 0.0 or 1e-3 <= abs(x) < 1e3:
        return f"{x:.3f}"
    return f"{x:.0e}"


def claims_table(verdicts: Sequence[Verdict]) -> Any:
    """claim, kind, source, samples met (independent problems) / skipped, ratios, verdict."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Claims", title_justify="left", pad_edge=False)
    table.add_column("claim", no_wrap=True)
    table.add_column("")
    table.add_column("source")
    for name in ("met", "problems", "skipped", "ratio min", "mean", "max", "s"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for v in verdicts:
        verdict = "holds" if v.passed else ("no sample met" if not v.met else "FAILS")
        table.add_row(
            v.id,
            _MARK[v.kind],
            v.tag,
            str(v.met),
            str(v.independent),
            str(v.skipped),
            *(_short(x) for x in v.ratio),
            f"{v.seconds:.1f}",
            Text(verdict, style="green" if v.passed else "bold red"),
        )
    return table


def controls_table(verdicts: Sequence[ControlVerdict]) -> Any:
    """claim, what is wrong, samples rejected of those met, verdict."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Controls: wrong on purpose, to be rejected", title_justify="left")
    table.add_column("claim", no_wrap=True)
    table.add_column("what is wrong")
    table.add_column("rejected", justify="right")
    table.add_column("verdict")
    for v in verdicts:
        verdict = "rejected" if v.passed else ("BROKEN" if v.errors else "ACCEPTED")
        table.add_row(
            v.id,
            v.name,
            f"{v.rejected} of {v.met}",
            Text(verdict, style="green" if v.passed else "bold red"),
        )
    return table


def failures(verdicts: Sequence[Verdict | ControlVerdict]) -> list[str]:
    """A few lines for everything that went wrong."""
    lines = []
    for v in verdicts:
        if v.passed:
            continue
        found = v.failures if isinstance(v, Verdict) else v.errors
        name = v.id if isinstance(v, Verdict) else f"{v.id}, control {v.name!r}"
        if not found and isinstance(v, Verdict):
            lines.append(f"{name}: no sample met the hypotheses, so nothing was verified")
        elif not found:
            lines.append(f"{name}: accepted on all {v.met} samples")
        lines.extend(f"{name}: {line}" for line in found[:3])
        if len(found) > 3:
            lines.append(f"{name}: and {len(found) - 3} more")
    return lines


def statement(claim: Claim) -> str:
    """A claim as plain text."""
    hypotheses = "; ".join(claim.hypotheses)
    return (
        f"{claim.id}: {claim.title}\n  {claim.statement}\n  if {hypotheses}\n"
        f"  [{claim.source.tag}] {claim.source.reference}"
    )


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in ("lrmanifold", "torch", "geoopt", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _plain(x: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    if isinstance(x, float) and not math.isfinite(x):
        return None if math.isnan(x) else str(x)
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return x


def write_json(
    path: Path,
    settings: Settings,
    verdicts: Sequence[Verdict],
    controls: Sequence[ControlVerdict],
) -> None:
    """Everything the run found, written to a temporary file and moved into place."""
    content = {
        "versions": versions(),
        "device": str(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "seed": settings.seed,
        "trials": settings.trials,
        "passed": all(v.passed for v in verdicts) and all(v.passed for v in controls),
        "claims": [{**vars(v), "passed": v.passed} for v in verdicts],
        "controls": [{**vars(v), "passed": v.passed} for v in controls],
        "not_covered": NOT_COVERED,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        text = json.dumps(_plain(content), indent=1, allow_nan=False, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(claim: Claim, folder: Path, settings: Settings) -> Path:
    """Draw the claim's picture to ``<folder>/<group>-<name>.png``."""
    if claim.figure is None:
        raise ValueError(f"{claim.id} has no figure")
    path = folder / f"{claim.id.replace('/', '-')}.png"
    folder.mkdir(parents=True, exist_ok=True)
    claim.figure(settings.dtype, settings.device).savefig(path, dpi=150)
    return path
