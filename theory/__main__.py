"""``python -m theory``: verify every claim behind robust low-rank training.

Exit code 0: all hold (with ``--controls``: all controls are rejected; with ``--mutate``: every
constant is looked at). 1: some claim fails, or has no sample that meets its hypotheses, or a
control is accepted. 2: the arguments make no sense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import catalogue

if TYPE_CHECKING:
    from .core import Claim
    from .runner import Settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m theory", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", metavar="ID", help="claims whose id matches this glob, e.g. 'geometry/*'")
    add("--trials", type=int, metavar="N", help="samples a claim (default: its own number)")
    add("--seed", type=int, default=0, metavar="S")
    add("--search", type=int, default=0, metavar="N", help="steps of an adversarial search a claim")
    add("--dtype", choices=("float32", "float64"), default="float64")
    add("--device", default="cpu", help="cpu or cuda")
    add("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    add("--plots", type=Path, metavar="DIR", help="save the pictures of the claims there")
    add("--json", type=Path, metavar="FILE", help="store the results, with every worst sample")
    add("--csv", type=Path, metavar="FILE", help="store the numbers as a table")
    add("--latex", type=Path, metavar="FILE", help="store the table for a paper")
    what = parser.add_mutually_exclusive_group()
    add = what.add_argument
    add("--controls", action="store_true", help="run the negative controls instead of the claims")
    add("--mutate", action="store_true", help="scale every constant by 0.9: each must be noticed")
    add("--list", action="store_true", help="state the claims and stop")
    add("--replay", metavar="ID:SEED", help="one sample of one claim, with its details")
    return parser


def _settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Settings:
    import torch

    from .runner import Settings

    if args.trials is not None and args.trials < 1:
        parser.error(f"--trials must be at least 1, got {args.trials}")
    for name in ("seed", "search"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} must not be negative, got {getattr(args, name)}")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} is not usable: {str(error).splitlines()[0]}")
    return Settings(args.seed, args.trials, getattr(torch, args.dtype), device, args.search)


def main(argv: Sequence[str] | None = None, *, claims: Sequence[Claim] | None = None) -> int:
    """Run from the command line; `claims` replaces the library's own (for tests)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.list:
        return _list(parser, args, claims)
    settings = _settings(parser, args)
    known = catalogue.claims() if claims is None else claims
    if args.replay is not None:
        return _replay(parser, args.replay, known, settings)
    chosen = catalogue.select(list(known), args.only)
    if not chosen:
        parser.error(f"--only {args.only!r} matches no claim; --list shows them")
    if args.plots is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error(
                "--plots needs matplotlib; install it with: pip install 'lrmanifold[demo]'"
            )
    import torch

    torch.set_num_threads(1)
    # Claims that are not the collection's own cannot be found by other processes.
    return _run(chosen, settings, args, jobs=1 if claims is not None else args.jobs)


def _list(
    parser: argparse.ArgumentParser, args: argparse.Namespace, claims: Sequence[Claim] | None
) -> int:
    known: list[Any] = list(claims) if claims is not None else list(catalogue.entries())
    chosen = catalogue.select(known, args.only)
    if not chosen:
        parser.error(f"--only {args.only!r} matches no claim; --list shows them")
    from .stating import statement

    print("\n\n".join(statement(claim) for claim in chosen))
    return 0


def _replay(
    parser: argparse.ArgumentParser, what: str, known: Sequence[Claim], settings: Settings
) -> int:
    from . import report, runner

    pattern, _, seed = what.rpartition(":")
    found = catalogue.select(list(known), pattern)
    if len(found) != 1 or not seed.isdecimal():
        parser.error(f"--replay must be the id of one claim and a seed, ID:SEED, got {what!r}")
    told = runner.replay(found[0], int(seed), settings)
    print(report.to_json(told), end="")
    return 0 if told["holds"] or not told["hypotheses_met"] else 1


def _run(
    chosen: Sequence[Claim], settings: Settings, args: argparse.Namespace, *, jobs: int | None
) -> int:
    import torch

    from . import report
    from .jobs import Kind, cores, run, tasks

    kind: Kind = "controls" if args.controls else "mutate" if args.mutate else "claims"
    todo = tasks(chosen, kind)
    done = _Progress(len(todo))
    found = run(todo, chosen, settings, jobs=jobs or cores(), on_done=done)
    done.clear()
    if kind == "controls":
        print(report.controls_table(found))
    elif kind == "mutate":
        print(report.mutations_table(found))
    else:
        print(report.claims_table(found))
        print(f"\n{report.KINDS}")
        if settings.dtype == torch.float32:
            print("\nTolerances in float32 (eps = 1.2e-7):")
            for claim in chosen:
                print(f"  {claim.id}: {claim.float32 or 'as in float64'}")
    for line in report.failures(found):
        print(line)
    print(f"\n{report.NOT_COVERED}")
    parts = {k: found if k == kind else [] for k in ("claims", "controls", "mutate")}
    if args.json is not None:
        report.write_json(args.json, settings, *parts.values())
    if args.csv is not None:
        report.write(args.csv, report.as_csv(parts["claims"]))
    if args.latex is not None:
        report.write(args.latex, report.as_latex(parts["claims"]))
    for claim in chosen if args.plots is not None else ():
        if claim.figure is not None:
            print(f"saved {report.save_figure(claim, args.plots, settings)}")
    return 0 if all(v.passed for v in found) else 1


class _Progress:
    """A line on a terminal's stderr, and nothing elsewhere."""

    def __init__(self, total: int) -> None:
        self.done, self.total = 0, total
        self.shown = sys.stderr.isatty()

    def __call__(self, task: Any) -> None:
        self.done += 1
        if self.shown:
            print(f"\r{self.done}/{self.total} {task.id:<48}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
