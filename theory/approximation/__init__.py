"""Claims: how near the low-rank flow, constrained or not, stays to the full flow."""

from __future__ import annotations

from ..core import Claim
from . import (
    a_priori,
    any_neighbour,
    certificate,
    constrained,
    constrained_defect,
    constrained_linear,
    exponent,
    isometries,
    koch_lubich,
    lipschitz,
    no_blow_up,
    prescribed_path,
    proportional,
    strongly_convex,
    unknown_gap,
)

CLAIMS: tuple[Claim, ...] = (
    certificate.CLAIM,
    a_priori.CLAIM,
    lipschitz.CLAIM,
    prescribed_path.CLAIM,
    strongly_convex.CLAIM,
    any_neighbour.CLAIM,
    unknown_gap.CLAIM,
    exponent.CLAIM,
    no_blow_up.CLAIM,
    proportional.CLAIM,
    koch_lubich.CLAIM,
    constrained.CLAIM,
    constrained_defect.CLAIM,
    constrained_linear.CLAIM,
    isometries.CLAIM,
)
