"""``python -m benchmarks.report``: the page from the table of ``benchmarks.robustness``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._record import FOLDER
from ..robustness.table import Table
from .page import render


def main() -> None:
    """Read, render, say where."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER / "robustness")
    options = parser.parse_args()
    rows = Table(options.results / "runs.jsonl").rows()
    if not rows:
        raise SystemExit(f"{options.results / 'runs.jsonl'}: no rows; make bench-robustness first")
    for path in render(rows, options.results):
        print(path)


if __name__ == "__main__":
    main()
