"""Robust low-rank training: well-conditioned fixed-rank weights on Riemannian manifolds."""

from . import linalg, nn, optim, retractions
from .errors import GeometryError
from .manifolds import Factors, FixedRank, Stiefel, WellConditioned
from .nn import densify, factorize

__version__ = "0.1.0"

__all__ = [
    "Factors",
    "FixedRank",
    "GeometryError",
    "Stiefel",
    "WellConditioned",
    "__version__",
    "densify",
    "factorize",
    "linalg",
    "nn",
    "optim",
    "retractions",
]
