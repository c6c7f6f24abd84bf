"""Smooth paths of orthogonal matrices, evaluated at any time without a matrix exponential."""

from __future__ import annotations

import torch
from torch import Tensor


class Rotation:
    """t -> exp(tJ) for a skew-symmetric J, from one eigendecomposition of iJ.

    Parameters
    ----------
    J : Tensor, shape (..., n, n)
        Skew-symmetric.
    """

    def __init__(self, J: Tensor) -> None:
        self.J = J
        self.values, self.vectors = torch.linalg.eigh(1j * J)

    @classmethod
    def random(cls, normal: Tensor, speed: float) -> Rotation:
        """From a Gaussian matrix; `speed` is about the largest angular velocity."""
        n = normal.shape[-1]
        return cls((normal - normal.mT) * (0.5 * speed / n**0.5))

    def __call__(self, t: Tensor | float) -> Tensor:
        """exp(tJ); a tensor `t` broadcasts against the matrices."""
        phases = torch.exp(-1j * t * self.values[..., None, :])
        return ((self.vectors * phases) @ self.vectors.mH).real
