"""Pre-training of a character model (width 128, 2 blocks), the rate of each method searched.

Every method is tuned by the same search: rates on a grid of factor 2 around a guess, extended
until the best, by the loss on the validation part, is not at an end. The table gives losses on the
test part.

    python -m benchmarks.language_model          # what is missing; may be stopped at any time
    python -m benchmarks.language_model table    # table and picture from the lines there are
"""

from __future__ import annotations

import sys

import torch

from .runner import Runs, everything


def main() -> None:
    """Run what is missing, or write the table."""
    torch.set_num_threads(1)
    if sys.argv[1:] == ["table"]:
        from .table import write

        write(Runs())
    else:
        everything(Runs())


if __name__ == "__main__":
    main()
