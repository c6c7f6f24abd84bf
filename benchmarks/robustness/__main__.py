"""``python -m benchmarks.robustness [NAME ...]``: run plans, fill their tables."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path

import torch

from .._record import FOLDER
from .plan import load
from .runner import Runner
from .share import AGAIN, spread

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
    parser.add_argument("--only", default="", help="families whose names hold this text")
    parser.add_argument("--skip", help="families whose names hold this text are left out")
    parser.add_argument(
        "--processes", type=int, default=1, help="so many at once, each with a family of a plan"
    )
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
    if options.processes > 1 and options.take is None:
        raise SystemExit(_together(options))
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
            only=options.only,
            skip=options.skip,
            log=functools.partial(print, flush=True),
        )
        if options.take is not None:
            print(name, sum(runner.take(folder) for folder in options.take), "rows taken")
        elif not runner.go():
            raise SystemExit(AGAIN)


def _together(options: argparse.Namespace) -> int:
    """This very command for every family by itself, several at once."""
    kept = ["device", "save_every", "results", "scratch"]
    kept += [key for key in ("root", "threads") if getattr(options, key) is not None]
    common = [text for k in kept for text in ("--" + k.replace("_", "-"), str(vars(options)[k]))]
    common += [f"--{key}" for key in ("unregistered", "keep") if vars(options)[key]]
    tasks = [
        (name, family.name)
        for name in options.names
        for family in load(options.results / name / "plan.toml").families
        if options.only in family.name and not (options.skip and options.skip in family.name)
    ]

    def command(name: str, family: str, minutes: float) -> list[str]:
        own = ["--only", family, "--minutes", str(minutes)]
        return [sys.executable, "-m", "benchmarks.robustness", name, *common, *own]

    return spread(command, tasks, options.processes, options.minutes)


if __name__ == "__main__":
    main()
