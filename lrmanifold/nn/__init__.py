"""Low-rank layers, and the conversion of whole models."""

from ._layer import LowRankLayer
from ._plan import Decision, Plan
from .adapter import LowRankAdapter
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .factorize import densify, factorize
from .fold import fold
from .linear import LowRankLinear

__all__ = [
    "Decision",
    "LowRankAdapter",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLayer",
    "LowRankLinear",
    "Plan",
    "densify",
    "factorize",
    "fold",
]
