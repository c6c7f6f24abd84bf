"""Robust low-rank training: well-conditioned fixed-rank weights on Riemannian manifolds."""

from . import linalg, nn, optim, retractions, robustness, viz
from .errors import GeometryError
from .manifolds import Factors, FixedRank, Stiefel, WellConditioned
from .nn import densify, factorize
from .report import Report, report

__version__ = "0.1.0"

__all__ = [
    "Factors",
    "FixedRank",
    "GeometryError",
    "Report",
    "Stiefel",
    "WellConditioned",
    "__version__",
    "densify",
    "factorize",
    "linalg",
    "nn",
    "optim",
    "report",
    "retractions",
    "robustness",
    "viz",
]
