"""Low-rank layers, and the conversion of whole models."""

from .adapter import LowRankAdapter, trained_state_dict
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .factorize import densify, factorize
from .fold import fold
from .layer import LowRankLayer
from .linear import LowRankLinear
from .plan import Decision, Plan

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
    "trained_state_dict",
]
