"""``python -m benchmarks.report``: a page for every plan that is finished, and their index."""

from __future__ import annotations

import argparse
from pathlib import Path

from lrmanifold.experiments.runs import write_atomically

from .._record import FOLDER
from . import overview, page
from .results import read


def main() -> None:
    """Read, render, say where."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER / "robustness")
    options = parser.parse_args()
    found = []
    for plan in sorted(options.results.glob("*/plan.toml")):
        results = read(plan.parent)
        if results is None:
            print(
                f"{plan.parent}: not finished, python -m benchmarks.robustness {plan.parent.name}"
            )
            continue
        found.append((plan.parent.name, results))
        print(page.write(results, plan.parent))
    if found:
        for name, drawing in overview.pictures(found).items():
            write_atomically(options.results / name, drawing)
        write_atomically(options.results / "report.md", overview.index(found).encode())


if __name__ == "__main__":
    main()
