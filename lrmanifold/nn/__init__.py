"""Low-rank layers, and the conversion of whole models."""

from .activations import MaxMin
from .adapt import adapt, merge, set_adapter, unmerge
from .adapted import AdaptedLayer
from .adapter import LowRankAdapter, trained_state_dict
from .attention import LowRankMultiheadAttention
from .blocks import ConvexPotential, Patchify, Residual
from .change import Change
from .conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from .conv_transpose import (
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
)
from .embedding import LowRankEmbedding
from .factorize import densify, factorize
from .fold import fold
from .inventory import Other
from .layer import LowRankLayer
from .linear import LowRankLinear
from .norm import MeanOnlyBatchNorm
from .plan import Decision, Plan
from .structure import restructure, structure
from .transposed import LowRankTransposedLinear

__all__ = [
    "AdaptedLayer",
    "Change",
    "ConvexPotential",
    "Decision",
    "LowRankAdapter",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankEmbedding",
    "LowRankLayer",
    "LowRankLinear",
    "LowRankMultiheadAttention",
    "LowRankTransposedLinear",
    "MaxMin",
    "MeanOnlyBatchNorm",
    "Other",
    "Patchify",
    "Plan",
    "Residual",
    "adapt",
    "densify",
    "factorize",
    "fold",
    "merge",
    "restructure",
    "set_adapter",
    "structure",
    "trained_state_dict",
    "unmerge",
]
