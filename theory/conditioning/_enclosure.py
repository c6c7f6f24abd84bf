"""Interval arithmetic on boxes: what holds for an enclosure holds at every point of the box.

``mpmath.iv`` rounds outwards, so an upper end is an upper bound, rounding included.
"""

from __future__ import annotations

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
    import math

    return math.nextafter(float(x.b), math.inf)
