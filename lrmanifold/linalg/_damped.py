"""Polar factors with damped singular values, by the cheaper of two ways."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import without_autocast
from ._common import differentiated
from ._orthonormal import gram
from ._products import damped_polar_by_products


@without_autocast
def damped_polar(X: Tensor, damping: float) -> Tensor:
    """X (XᵀX + δ²I)^(-1/2): singular values σ become σ/√(σ² + δ²).

    In float32 on the CPU by the eigenvalues of XᵀX in float64, whose rounding stays below δ² for
    every spectrum: 4 n r² flops and one decomposition of size r, a quarter of the time that
    :func:`damped_polar_by_products` takes for a tall X. All else goes there, and what is
    differentiated.

    Parameters
    ----------
    X : Tensor, shape (..., n, r)
        ‖X‖₂ <= 1.
    damping : float
        δ >= 1e-6.

    Returns
    -------
    Tensor, shape (..., n, r)
        NaN for a matrix with NaN or Inf.
    """
    # the derivative of eigenvectors does not exist where eigenvalues meet
    if X.device.type != "cpu" or X.dtype != torch.float32 or differentiated(X):
        return damped_polar_by_products(X, damping)
    try:
        values, Q = torch.linalg.eigh(gram(X.double()))
    except torch.linalg.LinAlgError:  # NaN or Inf in one matrix of the batch
        return damped_polar_by_products(X, damping)
    root = (Q * (values.clamp_min(0.0) + damping**2).rsqrt()[..., None, :]) @ Q.mT
    return X @ root.to(X.dtype)
