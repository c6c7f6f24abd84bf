"""Interval arithmetic on boxes: what holds for an enclosure holds at every point of the box.

``mpmath.iv`` rounds outwards, so an upper end is an upper bound, rounding included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def intervals() -> Any:
    """mpmath's interval context; of the extra ``[test]``."""
    from mpmath import iv

    iv.prec = 53
    return iv


def box(k: int, cells: int, low: float, high: float) -> Any:
    """The k-th of `cells` intervals of [low, high], geometrically spaced; they cover it."""
    iv = intervals()
    step = (iv.mpf(high) / iv.mpf(low)) ** (iv.mpf(1) / cells)
    left, right = iv.mpf(low) * step**k, iv.mpf(low) * step ** (k + 1)
    return iv.mpf([left.a, right.b])


def upper(x: Any) -> float:
    """Upper end, rounded up to a float."""
    return math.nextafter(float(x.b), math.inf)


def positive(x: Any) -> Any:
    """max(x, 0)."""
    iv = intervals()
    return iv.mpf([max(x.a, 0), max(x.b, 0)])


def bounded(f: Callable[[Any], Any], x: Any, limit: float, halvings: int) -> float:
    """Upper end of f over the interval x > 0, halved where a half is not seen to be below `limit`.

    Intervals forget that the same x occurs twice, which costs less on smaller ones. Both halves
    together cover x, so this is an upper bound with any number of halvings; the first half that
    stays above the limit ends the search.
    """
    top = upper(f(x))
    if top <= limit or not halvings:
        return top
    iv = intervals()
    middle = iv.sqrt(x.a * x.b)
    halves = (iv.mpf([x.a, middle.b]), iv.mpf([middle.a, x.b]))
    top = -math.inf
    for half in halves:
        found = bounded(f, half, limit, halvings - 1)
        if not found <= limit:
            return found
        top = max(top, found)
    return top
