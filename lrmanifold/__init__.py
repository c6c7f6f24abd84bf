"""Robust low-rank training: well-conditioned fixed-rank weights on Riemannian manifolds."""

from typing import TYPE_CHECKING

from . import certify, checkpoint, linalg, nn, optim, retractions, robustness, viz
from .errors import GeometryError
from .manifolds import Factors, FixedRank, Stiefel, WellConditioned
from .monitor import Monitor, monitor
from .nn import densify, factorize, fold
from .report import Report, report

__version__ = "0.1.0"

__all__ = [
    "Factors",
    "FixedRank",
    "GeometryError",
    "Monitor",
    "Report",
    "Stiefel",
    "WellConditioned",
    "__version__",
    "certify",
    "checkpoint",
    "densify",
    "factorize",
    "fold",
    "linalg",
    "monitor",
    "nn",
    "optim",
    "report",
    "retractions",
    "robustness",
    "viz",
]

if not TYPE_CHECKING:  # a type checker would take every name for known

    def __getattr__(name: str) -> object:
        """Names that live one room further in are named with it."""
        rooms = (optim, nn, robustness, certify, checkpoint, linalg, viz, retractions)
        found = [m.__name__ for m in rooms if name in getattr(m, "__all__", ())]
        hint = f"; it is {found[0]}.{name}" if found else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
