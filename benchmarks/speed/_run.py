"""What every benchmark shares: options, a table on the terminal, one JSON file, one picture."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .._record import FOLDER, conditions, record
from ._plot import Panel, draw
from ._timing import Quartiles, gemm_rate

PEERS = ("geotorch", "pymanopt")


@dataclass(frozen=True)
class Settings:
    """Where and how thoroughly to measure."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    quick: bool = False
    output: Path | None = None
    only: str | None = None
    seconds: float | None = None
    without: tuple[str, ...] = ()

    def pick(self, full: Any, quick: Any) -> Any:
        """`full`, or `quick` in a quick run."""
        return quick if self.quick else full

    @property
    def rounds(self) -> int:
        """Rounds of a comparison."""
        return int(self.pick(31, 3))

    @property
    def budget(self) -> float:
        """Seconds for one comparison."""
        if self.seconds is not None:
            return self.seconds
        return float(self.pick(15.0 if self.device.type == "cuda" else 60.0, 0.5))

    def gemm_rate(self) -> float:
        """The machine's float32 rate now, flops a second."""
        return gemm_rate(self.device, size=self.pick(None, 256))

    def chosen(self, cases: Mapping[str, Any]) -> dict[str, Any]:
        """The cases whose names hold the text of ``--only``."""
        found = {k: v for k, v in cases.items() if not self.only or self.only in k}
        if not found:
            raise SystemExit(f"--only {self.only!r} is in none of {', '.join(cases)}")
        return found


@dataclass
class Report:
    """What a benchmark found: `rows` for the table and the file, `panels` for the picture.

    `columns` maps keys of the rows to headings; keys that are missing in a row stay empty.
    """

    columns: Mapping[str, str]
    rows: list[dict[str, Any]]
    panels: list[Panel] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


Measure = Callable[[Settings], Report]


def _cell(value: Any) -> str:
    if isinstance(value, Quartiles):
        spread = max(value.upper - value.median, value.median - value.lower)
        loose = value.median and spread / abs(value.median) > 0.1
        return _cell(value.median) + (f" ±{spread / abs(value.median):.0%}" if loose else "")
    if isinstance(value, float):
        if math.isnan(value):
            return ""
        return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"
    return "" if value is None else str(value)


def _plain(value: Any) -> Any:
    """For JSON: quartiles as a dict, NaN as null."""
    if isinstance(value, Quartiles):
        return _plain(value.as_dict())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def show(title: str, report: Report) -> None:
    """Print the table."""
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(report.columns.values()):
        table.add_column(heading, justify="left" if i < 2 else "right")
    for row in report.rows:
        table.add_row(*(_cell(row.get(key)) for key in report.columns))
    console = Console()
    # Into a file a table is not broken to a terminal's width.
    Console(width=console.width if console.is_terminal else 180).print(table)


def publish(name: str, report: Report, settings: Settings) -> None:
    """Write the JSON file and the picture; a quick run without ``--output`` writes nothing."""
    if settings.quick and settings.output is None:
        return
    payload = _plain(
        {
            "device": settings.device.type,
            "threads": settings.threads,
            "quick": settings.quick,
            "without": settings.without,
            "peers": _versions(),
            **report.facts,
            "rows": report.rows,
        }
    )
    suffix = "" if settings.device.type == "cpu" else f"_{settings.device.type}"
    suffix += "" if settings.threads == 1 else f"_{settings.threads}_threads"
    if settings.only is not None:
        suffix += "_" + re.sub(r"\W+", "-", settings.only).strip("-").lower()
    stem = f"speed_{name}{suffix}"
    if settings.output is None:
        record(stem, payload)
    else:
        settings.output.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"conditions": conditions(), "results": payload}, indent=1)
        (settings.output / f"{stem}.json").write_text(text + "\n")
    # One or two cases make no curve.
    if report.panels and settings.only is None:
        draw(report.panels).savefig((settings.output or FOLDER) / f"{stem}.png", dpi=120)


def parse(argv: Sequence[str] | None, description: str, prog: str) -> Settings:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=1, metavar="N", help="of torch on the CPU (default 1)")
    add("--quick", action="store_true", help="tiny sizes: does it run? writes only with --output")
    add("--output", type=Path, metavar="DIR", help="for JSON and picture (benchmarks/results)")
    add("--only", metavar="TEXT", help="cases whose name holds this text")
    add(
        "--without",
        nargs="+",
        default=(),
        metavar="TEXT",
        help="peers whose name holds one of these",
    )
    add("--seconds", type=float, metavar="S", help="for one comparison (60; on a GPU 15)")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    return Settings(
        torch.device(args.device),
        args.threads,
        args.quick,
        args.output,
        only=args.only,
        seconds=args.seconds,
        without=tuple(args.without),
    )


def execute(name: str, measure: Measure, settings: Settings) -> Report:
    """Measure, print, write."""
    if settings.device.type == "cpu":
        torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    report = measure(settings)
    head = (measure.__doc__ or name).split("\n")[0]
    facts = ", ".join(f"{k} {_cell(v)}" for k, v in report.facts.items() if not _nested(v))
    where = f"{settings.device.type}, {torch.get_num_threads()} threads"
    show(f"{name}: {head}\n{where}{', ' if facts else ''}{facts}", report)
    publish(name, report, settings)
    return report


def _nested(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple))


def main(name: str, measure: Measure, argv: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.speed.NAME``."""
    description = (measure.__doc__ or name).split("\n")[0]
    execute(name, measure, parse(argv, description, f"python -m benchmarks.speed.{name}"))
