"""Where a warning points: the line of the user, not one of torch or of this library."""

from __future__ import annotations

import sys

_INSIDE = ("lrmanifold", "torch")


def stack_level() -> int:
    """The `stacklevel` of a warning that the caller gives: the first frame outside of both.

    torch wraps steps, schedulers once more, so that no fixed number is right.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _INSIDE:
            return level
        frame, level = frame.f_back, level + 1
    return level
