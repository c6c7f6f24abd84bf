"""Claims: what a certificate of robustness rests on, and the mistakes that would break it."""

from __future__ import annotations

from ..core import Claim
from . import (
    certificates,
    composition,
    convex_potential,
    frames,
    gram_iteration,
    grid,
    pairwise_margin,
    pooling,
    zero_padding,
)

CLAIMS: tuple[Claim, ...] = (
    frames.CLAIM,
    composition.CLAIM,
    pairwise_margin.CLAIM,
    convex_potential.CLAIM,
    pooling.CLAIM,
    zero_padding.CLAIM,
    grid.CLAIM,
    gram_iteration.CLAIM,
    certificates.CLAIM,
)
