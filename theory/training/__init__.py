"""Claims: what is really trained, by finite steps, minibatches, momentum, in several layers."""

from __future__ import annotations

from ..core import Claim
from . import (
    catching_up,
    constrained_steps,
    discrete,
    discrete_a_priori,
    momentum,
    momentum_one_sided,
    noise,
    outputs,
    product,
    projected_step,
    transport,
)

CLAIMS: tuple[Claim, ...] = (
    discrete.CLAIM,
    discrete_a_priori.CLAIM,
    product.CLAIM,
    projected_step.CLAIM,
    constrained_steps.CLAIM,
    outputs.CLAIM,
    noise.CLAIM,
    momentum.CLAIM,
    momentum_one_sided.CLAIM,
    transport.CLAIM,
    catching_up.CLAIM,
)
