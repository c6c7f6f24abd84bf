"""Low-rank layers, and the conversion of whole models."""

from .activations import MaxMin
from .adapter import LowRankAdapter, trained_state_dict
from .blocks import ConvexPotential, Patchify, Residual
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .factorize import densify, factorize
from .fold import fold
from .layer import LowRankLayer
from .linear import LowRankLinear
from .plan import Decision, Plan

__all__ = [
    "ConvexPotential",
    "Decision",
    "LowRankAdapter",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLayer",
    "LowRankLinear",
    "MaxMin",
    "Patchify",
    "Plan",
    "Residual",
    "densify",
    "factorize",
    "fold",
    "trained_state_dict",
]
