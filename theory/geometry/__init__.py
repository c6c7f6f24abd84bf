"""Claims: geometry of M_r, its retractions, and of orthonormal frames."""

from __future__ import annotations

from ..core import Claim
from . import (
    cholesky_qr,
    curvature,
    curvature_spectral,
    gradient_map,
    gram_drift,
    normal_component,
    normal_component_other,
    principal_curvatures,
    probe_gradient,
    projection_derivative,
    projector_distance,
    prox_regularity,
    retraction_error,
    retraction_order,
    second_fundamental_form,
    sin_theta,
    stiefel_order,
    tangent_space,
)

CLAIMS: tuple[Claim, ...] = (
    tangent_space.CLAIM,
    gradient_map.CLAIM,
    probe_gradient.CLAIM,
    retraction_order.CLAIM,
    retraction_error.CLAIM,
    stiefel_order.CLAIM,
    cholesky_qr.CLAIM,
    gram_drift.CLAIM,
    sin_theta.CLAIM,
    projector_distance.CLAIM,
    curvature.CLAIM,
    curvature_spectral.CLAIM,
    prox_regularity.CLAIM,
    normal_component.CLAIM,
    normal_component_other.CLAIM,
    second_fundamental_form.CLAIM,
    principal_curvatures.CLAIM,
    projection_derivative.CLAIM,
)
