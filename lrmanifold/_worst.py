"""The worst of some measurements, of which one may be NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable


def worst(values: Iterable[float], default: float = math.nan) -> float:
    """The largest, or NaN if there is one: Python's ``max`` shows NaN only where it comes first."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found, default=default)
