"""``python -m theory``: verify every claim behind robust low-rank training.

Exit code 0: all hold (with ``--controls``: all controls are rejected). 1: some claim fails, or has
no sample that meets its hypotheses, or a control is accepted. 2: the arguments make no sense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from . import claims as all_claims
from . import report, runner
from .core import Claim


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m theory", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", metavar="ID", help="claims whose id matches this glob, e.g. 'geometry/*'")
    add("--trials", type=int, metavar="N", help="samples a claim (default: its own number)")
    add("--seed", type=int, default=0, metavar="S")
    add("--dtype", choices=("float32", "float64"), default="float64")
    add("--device", default="cpu", help="cpu or cuda")
    add("--plots", type=Path, metavar="DIR", help="save the pictures of the claims there")
    add("--json", type=Path, metavar="FILE", help="store the results")
    add("--controls", action="store_true", help="run the negative controls instead of the claims")
    add("--list", action="store_true", help="state the claims and stop")
    return parser


def _settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> runner.Settings:
    if args.trials is not None and args.trials < 1:
        parser.error(f"--trials must be at least 1, got {args.trials}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} is not usable: {str(error).splitlines()[0]}")
    return runner.Settings(args.seed, args.trials, getattr(torch, args.dtype), device)


def main(argv: Sequence[str] | None = None, *, claims: Sequence[Claim] | None = None) -> int:
    """Run from the command line; `claims` replaces the library's own (for tests)."""
    parser = _parser()
    args = parser.parse_args(argv)
    known = all_claims() if claims is None else claims
    chosen = runner.select(known, args.only)
    if not chosen:
        parser.error(f"--only {args.only!r} matches no claim; --list shows them")
    if args.list:
        print("\n\n".join(report.statement(claim) for claim in chosen))
        return 0
    settings = _settings(parser, args)
    try:
        import rich  # noqa: F401

        if args.plots is not None:
            import matplotlib  # noqa: F401
    except ImportError as error:
        parser.error(f"{error.name} is missing; install it with: pip install 'lrmanifold[demo]'")
    # Matrices are tiny: one thread is faster, and the same numbers come out on every machine.
    torch.set_num_threads(1)
    return _run(chosen, settings, args)


def _run(chosen: Sequence[Claim], settings: runner.Settings, args: argparse.Namespace) -> int:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=128)
    say = partial(console.print, highlight=False, markup=False)

    verdicts, controls = _verify(chosen, settings, controls=args.controls)
    if args.controls:
        say(report.controls_table(controls))
    else:
        say(report.claims_table(verdicts))
        say(report.KINDS)
        if settings.dtype == torch.float32:
            say("\nTolerances in float32 (eps = 1.2e-7):")
            for claim in chosen:
                say(f"  {claim.id}: {claim.float32 or 'as in float64'}")
    for line in report.failures([*verdicts, *controls]):
        say(line, style="red")
    say(f"\n{report.NOT_COVERED}")
    if args.json is not None:
        report.write_json(args.json, settings, verdicts, controls)
    for claim in chosen if args.plots is not None else ():
        if claim.figure is not None:
            say(f"saved {report.save_figure(claim, args.plots, settings)}")
    passed = all(v.passed for v in verdicts) and all(v.passed for v in controls)
    return 0 if passed else 1


def _verify(
    chosen: Sequence[Claim], settings: runner.Settings, *, controls: bool
) -> tuple[list[runner.Verdict], list[runner.ControlVerdict]]:
    """All claims, or all their controls, with a progress bar on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    verdicts: list[runner.Verdict] = []
    rejections: list[runner.ControlVerdict] = []
    stderr = Console(stderr=True)
    look = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *look, TimeElapsedColumn(), console=stderr, disable=not stderr.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("", total=sum(_steps(c, settings, controls=controls) for c in chosen))
        step = partial(bar.advance, task)
        for claim in chosen:
            bar.update(task, description=f"{claim.id:<40}")
            if controls:
                for control in claim.controls:
                    found = runner.verify_control(claim, control, settings, on_step=step)
                    rejections.append(found)
            else:
                verdicts.append(runner.verify(claim, settings, on_step=step))
    return verdicts, rejections


def _steps(claim: Claim, settings: runner.Settings, *, controls: bool) -> int:
    if controls:
        return len(claim.controls) * len(settings.seeds(runner.control_trials(claim)))
    return len(settings.seeds(claim.trials))


if __name__ == "__main__":
    sys.exit(main())
