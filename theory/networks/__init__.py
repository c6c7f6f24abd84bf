"""Claims: condition numbers of layers and networks, and where the usual bounds fail."""

from __future__ import annotations

from ..core import Claim
from . import (
    activations,
    bias,
    chain_rule,
    condition_number,
    convolution_condition,
    convolution_corrected,
    convolution_counterexample,
    convolution_norm,
    corrected_product,
    plain_product,
    residual,
)

CLAIMS: tuple[Claim, ...] = (
    condition_number.CLAIM,
    chain_rule.CLAIM,
    plain_product.CLAIM,
    corrected_product.CLAIM,
    activations.CLAIM,
    bias.CLAIM,
    convolution_norm.CLAIM,
    convolution_condition.CLAIM,
    convolution_counterexample.CLAIM,
    convolution_corrected.CLAIM,
    residual.CLAIM,
)
