"""geoopt manifolds of low-rank matrices and of their orthonormal factors."""

from ..factors import Factors
from .fixed_rank import FixedRank
from .stiefel import Stiefel
from .well_conditioned import WellConditioned

__all__ = ["Factors", "FixedRank", "Stiefel", "WellConditioned"]
