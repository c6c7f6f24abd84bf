"""``python -m theory``: verify every claim behind robust low-rank training.

Exit code 0: all hold (with ``--controls``: all controls are rejected; with ``--mutate``: every
constant is looked at). 1: some claim fails, or has no sample that meets its hypotheses, or a
control is accepted. 2: the arguments make no sense, or a file could not be written. 130: stopped.
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import catalogue
from .outputs import check_places, list_json, say, store
from .stating import statement

if TYPE_CHECKING:
    from .core import Claim
    from .runner import Settings


_RUN = {"only", "trials", "seed", "device", "jobs", "plots", "json"}
#: What else each kind of run takes; all others would be ignored.
_TAKES = {
    "list": {"only", "json"},
    "replay": {"dtype", "device", "json"},
    "controls": {*_RUN, "dtype"},
    "mutate": _RUN - {"trials"},
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the summary of all options."""
        self.exit(2, f"error: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m theory", description=__doc__.split("\n")[0])
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


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for kind, takes in _TAKES.items():
        if not getattr(args, kind):
            continue
        for name, value in vars(args).items():
            if name not in {kind, *takes} and value != parser.get_default(name):
                good = ", ".join(f"--{x}" for x in sorted(takes))
                parser.error(f"--{name} has no effect with --{kind}, which takes {good}")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if args.plots is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error(
                "--plots needs matplotlib; install it with: pip install 'lrmanifold[demo]'"
            )


def _check_places(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Last of all: it makes the folders."""
    files = {f"--{name}": getattr(args, name) for name in ("json", "csv", "latex")}
    try:
        check_places(files, {"--plots": args.plots})
    except ValueError as error:
        parser.error(str(error))


def _settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Settings:
    import torch

    from .runner import Settings, usable

    dtype = getattr(torch, args.dtype)
    try:
        device = usable(args.device, dtype)
        return Settings(args.seed, args.trials, dtype, device, args.search)
    except ValueError as error:  # starts with the name of the argument
        parser.error(f"--{error}")


def main(argv: Sequence[str] | None = None, *, claims: Sequence[Claim] | None = None) -> int:
    """Run from the command line; `claims` replaces the library's own (for tests)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without σ is no reason to fail
    try:
        return _main(argv, claims)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _main(argv: Sequence[str] | None, claims: Sequence[Claim] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    if args.list:
        known: list[Any] = list(claims) if claims is not None else list(catalogue.entries())
        return _list(parser, args, _chosen(parser, args, known))
    settings = _settings(parser, args)
    every = list(catalogue.claims() if claims is None else claims)
    if args.replay is not None:
        return _replay(parser, args, every, settings)
    chosen = _chosen(parser, args, every)
    _check_places(parser, args)
    import torch

    torch.set_num_threads(1)
    # Claims that are not the collection's own cannot be found by other processes.
    return _run(chosen, settings, args, jobs=1 if claims is not None else args.jobs)


def _chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, known: list[Any]) -> Any:
    chosen = catalogue.select(known, args.only)
    if not chosen:
        parser.error(f"--only {args.only!r} matches no claim; --list shows them")
    return chosen


def _list(parser: argparse.ArgumentParser, args: argparse.Namespace, chosen: Sequence[Any]) -> int:
    _check_places(parser, args)
    wrong = _stored({args.json: lambda: list_json(chosen)})
    say("\n\n".join(statement(claim) for claim in chosen))
    return wrong


def _replay(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    known: list[Claim],
    settings: Settings,
) -> int:
    from . import report, runner

    pattern, _, seed = args.replay.rpartition(":")
    found = catalogue.select(known, pattern)
    if len(found) != 1 or not seed.isdecimal():
        parser.error(
            f"--replay must be the id of one claim and a seed, ID:SEED, got {args.replay!r}"
        )
    # many digits are too many for int(), too
    if len(seed) > 20 or int(seed) > runner.LAST_TRIAL:
        parser.error(f"--replay must have a seed in 0..{runner.LAST_TRIAL}, got {args.replay!r}")
    _check_places(parser, args)
    told = runner.replay(found[0], int(seed), settings)
    text = report.to_json(told)
    wrong = _stored({args.json: lambda: text})
    say(text.rstrip("\n"))
    return wrong or (0 if told["holds"] or not told["hypotheses_met"] else 1)


def _run(
    chosen: Sequence[Claim], settings: Settings, args: argparse.Namespace, *, jobs: int | None
) -> int:
    import torch

    from . import report
    from .jobs import Kind, cores, run, tasks

    kind: Kind = "controls" if args.controls else "mutate" if args.mutate else "claims"
    todo = tasks(chosen, kind)
    done = _Progress(len(todo))
    try:
        found = run(todo, chosen, settings, jobs=jobs or cores(), on_done=done)
    finally:
        done.clear()
    parts = {k: found if k == kind else [] for k in ("claims", "controls", "mutate")}
    # Files first: what reads the table may leave early.
    wrong = _stored(
        {
            args.json: lambda: report.as_json(settings, *parts.values()),
            args.csv: lambda: report.as_csv(found),
            args.latex: lambda: report.as_latex(found),
        }
    )
    if kind == "controls":
        say(report.controls_table(found))
    elif kind == "mutate":
        say(report.mutations_table(found))
    else:
        say(f"{report.claims_table(found)}\n\n{report.KINDS}")
        if settings.dtype == torch.float32:
            say("\nTolerances in float32 (eps = 1.2e-7):")
            for claim in chosen:
                say(f"  {claim.id}: {claim.float32 or 'as in float64'}")
    for line in report.failures(found):
        say(line)
    say(f"\n{report.NOT_COVERED}")
    for claim in chosen if args.plots is not None else ():
        if claim.figure is not None:
            path = args.plots / report.figure_name(claim)
            if not _stored({path: functools.partial(report.as_png, claim, settings)}):
                say(f"saved {path}")
            else:
                wrong = 2
    return wrong or (0 if all(v.passed for v in found) else 1)


def _stored(files: Mapping[Path | None, Callable[[], str | bytes]]) -> int:
    """Write the files that were asked for: 0, or 2 after a line about each that was not written."""
    wrong = 0
    for path, content in files.items():
        if path is None:
            continue
        made = content()
        problem = store(path, made.encode() if isinstance(made, str) else made)
        if problem:
            print(f"error: {problem}", file=sys.stderr)
            wrong = 2
    return wrong


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
