"""The console script ``lrmanifold``: ``demo``, ``train``, ``report``, ``certify``."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 with one line that says what is wrong.

    Needs typer and rich, which the core library does not: ``pip install 'lrmanifold[demo]'``.
    """
    try:
        from ._commands import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click", "shellingham"):
            raise
        print(
            f"error: the command line needs {error.name}, not installed: "
            "pip install 'lrmanifold[demo]'",
            file=sys.stderr,
        )
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without σ is no reason to fail
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say
            # not standalone: typer would print a box of several lines for a wrong option
            return app(args=arguments, prog_name="lrmanifold", standalone_mode=False) or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # as `| head` does; and nothing more may be flushed to it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # where the output goes: files of results have been written, or have told what failed
        print("error: no space left for the output", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ == "Abort":  # what typer makes of the interrupt
            print("stopped", file=sys.stderr)
            return 130
        # click's errors, which some versions of typer bring along under a name of their own
        if not hasattr(error, "format_message"):
            raise
        print("error: " + " ".join(error.format_message().split()), file=sys.stderr)
        return 2


def _say(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one line; where it comes from says nothing on the command line."""
    print("warning: " + " ".join(str(message).split()), file=sys.stderr)
