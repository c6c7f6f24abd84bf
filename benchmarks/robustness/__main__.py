"""``python -m benchmarks.robustness [FILE ...] [--full]``: run experiments, fill the table."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from .._record import FOLDER
from . import experiment
from .display import Display
from .runner import Runner, threads

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = ("digits",)
REPOSITORY = Path(__file__).resolve().parents[2]


def chosen(names: list[str], *, full: bool) -> list[Path]:
    """The named files (paths, or names in ``configs/``), the default set, or all for the CPU."""
    if names:
        return [Path(n) if n.endswith(".toml") else CONFIGS / f"{n}.toml" for n in names]
    if full:
        rest = [p for p in sorted(CONFIGS.glob("*.toml")) if not p.stem.startswith("cifar")]
        return sorted(rest, key=lambda path: path.stem not in DEFAULT)
    return [CONFIGS / f"{name}.toml" for name in DEFAULT]


def main() -> None:
    """Parse the command line and work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness", description=__doc__)
    parser.add_argument("files", nargs="*", help="TOML files, or names in configs/")
    parser.add_argument("--full", action="store_true", help="all experiments for the CPU")
    parser.add_argument("--root", help="folder of the data (default: $LRMANIFOLD_DATA)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--amp", action="store_true", help="forward in bfloat16")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the seeds")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--results", type=Path, default=FOLDER / "robustness")
    parser.add_argument("--scratch", type=Path, default=REPOSITORY / "runs" / "robustness")
    options = parser.parse_args()
    threads(options.threads)
    experiments = [experiment.load(p) for p in chosen(options.files, full=options.full)]
    runner = Runner(
        options.results,
        options.scratch,
        options.root,
        device=options.device,
        amp=options.amp,
        minutes=options.minutes,
        seeds=options.seeds,
    )
    with Display() as display:
        finished = runner.go(experiments, display)
    raise SystemExit(0 if finished else 75)  # 75: try again (EX_TEMPFAIL)


if __name__ == "__main__":
    main()
