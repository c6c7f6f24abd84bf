"""The clip of a core that moves little between calls: most need no decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from ._conditioning import Centre, clip_near, spectral_clip


class ClipMemory:
    r"""What :func:`spectral_clip` found out about a core, to spare the next calls the work.

    Keeps a core :math:`S_0` with its extreme singular values. By Weyl's inequality those of `S` are
    within :math:`d = \|S - S_0\|_F` of them, so :math:`\sigma_1(S_0) + d \le
    (1 + \tau)(\sigma_r(S_0) - d)` proves that `S` is feasible. Where Frobenius' norm is too coarse
    three products bound the spectral norm of :math:`S - S_0`. Results are those of
    :func:`spectral_clip` whatever is remembered, so it need not be saved.

    It serves ``margin > 0``, whose clipped cores lie inside the set, and cores that are inside of
    themselves; not batches, ``tau = 0``, ``centre = "mean"`` or accelerators.
    """

    # Squares of numbers far below these sizes still have their digits in float32.
    _smallest = 1e-12

    def __init__(self) -> None:
        self._core: Tensor | None = None
        self._low = self._high = 0.0

    def clip(
        self, S: Tensor, tau: float, *, centre: Centre = "metric", margin: float = 0.0
    ) -> Tensor:
        """:func:`spectral_clip` of `S`, shape (r, r); `S` itself if it is feasible."""
        plain = S.ndim == 2 and S.device.type == "cpu" and S.shape[-1] > 1
        if not (plain and tau > 0 and centre == "metric") or S.requires_grad:
            return spectral_clip(S, tau, centre=centre, margin=margin)
        if self.proves(S, tau):
            return S
        found = clip_near(S, tau, centre, margin, certify=False)
        if found is None or found.low is None or found.high is None:
            self._core = None
            return spectral_clip(S, tau, centre=centre, margin=margin)
        self._core, self._low, self._high = found.S.clone(), found.low, found.high
        return found.S

    def proves(self, S: Tensor, tau: float) -> bool:
        """Whether ``cond(S) <= 1 + tau`` follows from what is remembered."""
        core = self._core
        if core is None or core.shape != S.shape or core.dtype != S.dtype:
            return False
        # Of the remembered values: eigenvalues of a product of size r.
        rounding = 8.0 * S.shape[-1] * torch.finfo(S.dtype).eps * self._high

        def within(d: float) -> bool:
            d += rounding
            return self._high + d <= (1.0 + tau) * (self._low - d)

        if not self._smallest <= self._low <= self._high <= 1.0 / self._smallest:
            return False  # squares of the difference would over- or underflow
        D = S - core
        d = float(torch.linalg.vector_norm(D))
        if within(d):
            return True
        # The 2-norm is between d/√r and d: where it may do, three products find it to r^(1/16).
        return within(d / S.shape[-1] ** 0.5) and within(_spectral_bound(D, d))


def _spectral_bound(D: Tensor, size: float) -> float:
    """Upper bound for ‖D‖₂ from its Frobenius norm `size`: ‖(DᵀD)⁴‖_F^(1/8)."""
    G = D / size  # or high powers would underflow
    for _ in range(3):
        G = G.mT @ G  # DᵀD first, then squares of symmetric matrices
    # The rounding of three products, to an eighth.
    return size * float(torch.linalg.vector_norm(G)) ** 0.125 * (1.0 + 1e-2)
