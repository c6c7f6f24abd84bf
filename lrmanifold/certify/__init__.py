"""Proofs of robustness: Lipschitz bounds, certified radii, verified accuracy, and training.

A bound here is an upper bound including the rounding of its own computation, for the function that
a model's stored numbers define in evaluation mode. Whatever has no bound is an error that names the
module and a way out; nothing is guessed and nothing of a forward is left out.
"""

from .bounds import Bound, BoundError, CertificationError, Context, register_bound
from .lipschitz import LipschitzBound, LipschitzReport, Row, lipschitz
from .loss import CertifiedLoss, worst_case_logits
from .margins import radius, verified_accuracy

__all__ = [
    "Bound",
    "BoundError",
    "CertificationError",
    "CertifiedLoss",
    "Context",
    "LipschitzBound",
    "LipschitzReport",
    "Row",
    "lipschitz",
    "radius",
    "register_bound",
    "verified_accuracy",
    "worst_case_logits",
]
