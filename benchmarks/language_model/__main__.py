"""Pre-training of a character model (two blocks), the rate of each method searched.

Every method is tuned by the same search: rates on a grid of factor 2 around a guess, extended
until the best, by the loss on the validation part, is not at an end. The table gives losses on the
test part.

    python -m benchmarks.language_model          # what is missing; may be stopped at any time
    python -m benchmarks.language_model times    # of steps, all methods by turns
    python -m benchmarks.language_model table    # table and picture from the lines there are
    python -m benchmarks.language_model --width 256 --steps 1000 --processes 6 --minutes 8

At another width or length the lines have a file of their own, and the searches begin at the best
rates of width 128.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from .runner import LINES, STEPS, WIDTH, Runs, measure_times
from .work import work


def main() -> None:
    """Run what is missing, or write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["run", "times", "table"], default="run")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--lines", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs()
    if (options.width, options.steps) != (WIDTH, STEPS):
        path = LINES.with_name(f"language_model_{options.width}_{options.steps}.jsonl")
        runs = Runs(options.lines or path, options.width, options.steps, guesses=runs)
    elif options.lines:
        runs = Runs(options.lines)
    if options.what == "table":
        from .table import write

        write(runs)
    elif options.what == "times":
        measure_times(runs)
    else:
        work(runs, options.processes, options.minutes)


if __name__ == "__main__":
    main()
