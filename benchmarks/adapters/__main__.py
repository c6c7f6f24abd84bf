"""Fine-tuning of a small character model on another text: adapters side by side.

A transformer of width 128 is trained on the Python reference (40 seconds, the same each time).
Then all its weights are frozen and adapters on the linear layers of its blocks are trained on the
source code of argparse. Rates on a grid of factor 2, by the validation part; the table shows the
test part.

    python -m benchmarks.adapters          # what is missing; may be stopped at any time
    python -m benchmarks.adapters table    # table and picture from the lines there are
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .runner import LINES, Runs, everything


def main() -> None:
    """Run what is missing, or write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["run", "table"], default="run")
    parser.add_argument("--lines", type=Path, default=LINES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(options.lines)
    if options.what == "table":
        from .table import write

        write(runs)
    else:
        everything(runs)


if __name__ == "__main__":
    main()
