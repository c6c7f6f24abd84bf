"""Claims: low-rank integrators, their order, robustness, exactness and descent."""

from __future__ import annotations

from ..core import Claim
from . import descent, exactness, order, retractions, small_singular_values

CLAIMS: tuple[Claim, ...] = (
    order.CLAIM,
    small_singular_values.CLAIM,
    exactness.CLAIM,
    descent.CLAIM,
    retractions.CLAIM,
)
