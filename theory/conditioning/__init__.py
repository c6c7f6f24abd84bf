"""Claims: the condition number of cores, as a constraint and as a penalty."""

from __future__ import annotations

from ..core import Claim
from . import (
    cone_projection,
    enclosed,
    exact_projection,
    k_tau_projection,
    k_tau_prox,
    mean_clamp,
    penalty_converse,
    penalty_exponential,
    penalty_scale_free,
    penalty_value,
    penalty_weakly_convex,
    qr_against_polar,
    stability,
    stability_linear,
    tau_zero,
)

CLAIMS: tuple[Claim, ...] = (
    exact_projection.CLAIM,
    mean_clamp.CLAIM,
    cone_projection.CLAIM,
    tau_zero.CLAIM,
    qr_against_polar.CLAIM,
    penalty_value.CLAIM,
    penalty_exponential.CLAIM,
    penalty_scale_free.CLAIM,
    penalty_converse.CLAIM,
    penalty_weakly_convex.CLAIM,
    stability.CLAIM,
    stability_linear.CLAIM,
    k_tau_projection.CLAIM,
    k_tau_prox.CLAIM,
    enclosed.CLAIM,
)
