"""Every claim behind robust low-rank training, as a program that could prove it wrong."""

from __future__ import annotations

from . import approximation, certification, conditioning, geometry, integrators, networks
from .core import Claim, Control, Evidence, Source

_GROUPS = (geometry, conditioning, approximation, integrators, networks, certification)


def claims() -> tuple[Claim, ...]:
    """All claims, in the order in which a reader would meet them."""
    return tuple(claim for group in _GROUPS for claim in group.CLAIMS)


__all__ = ["Claim", "Control", "Evidence", "Source", "claims"]
