"""``python -m benchmarks.robustness [NAME ...]``: run plans, fill their tables.

Several processes started alike share the work.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from pathlib import Path

import torch

from .._record import FOLDER
from .runner import Runner

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    """Parse the command line and work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__)
    parser.add_argument("names", nargs="*", default=["digits"], help="folders with a plan.toml")
    parser.add_argument("--root", help="folder of the data (default: $LRMANIFOLD_DATA)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--results", type=Path, default=FOLDER / "robustness")
    parser.add_argument("--scratch", type=Path, default=REPOSITORY / "runs" / "robustness")
    parser.add_argument("--save-every", type=int, default=500, help="batches between checkpoints")
    parser.add_argument("--unregistered", action="store_true", help="run a plan without a commit")
    parser.add_argument(
        "--take", type=Path, nargs="*", metavar="DIR", help="only add rows from elsewhere"
    )
    parser.add_argument("--keep", action="store_true", help="keep the networks of the test")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device != "cpu":
        # attacks compare logits: convolutions in float32 as on the CPU, not in TF32
        torch.backends.cudnn.allow_tf32 = False
    for name in options.names:
        runner = Runner(
            options.results / name,
            options.scratch,
            options.root,
            device=options.device,
            minutes=options.minutes,
            save_every=options.save_every,
            unregistered=options.unregistered,
            keep=options.keep,
            log=functools.partial(print, flush=True),
        )
        if options.take is not None:
            print(name, sum(runner.take(folder) for folder in options.take), "rows taken")
        elif not runner.go():
            raise SystemExit(os.EX_TEMPFAIL)  # 75: call again


if __name__ == "__main__":
    main()
