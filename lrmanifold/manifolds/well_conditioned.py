"""Fixed-rank matrices whose condition number is bounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import linalg
from .._arguments import check_choice, check_number
from .fixed_rank import FixedRank, Gradient


class WellConditioned(FixedRank):
    r"""Well-conditioned fixed-rank matrices,
    :math:`\mathcal M_r^\tau = \{W \in \mathcal M_r : \sigma_1(W) \le (1+\tau)\,\sigma_r(W)\}`.

    Representation, tangent vectors and metric are those of :class:`FixedRank`, of which this is a
    closed subset (a manifold with a curved boundary; for τ = 0 smooth, the scaled partial
    isometries α Q). `projx`, `retr`, `expmap`, `random`, `origin` and `from_dense` return points of
    the set, so any optimizer that moves by them stays robust. Tangent vectors are those of M_r: at
    the boundary the outward part of a step is removed by the projection that ends the retraction.

    Parameters
    ----------
    m, n : int
    rank : int
        In 1..min(m, n).
    tau : float
        Bound for the condition number minus 1; finite and at least 0.
    centre : {"metric", "mean"}
        How a core is brought back: the exact Frobenius projection, or the clamp published with
        CondLR; see :func:`lrmanifold.linalg.spectral_clip`.
    retraction : str or callable
        "factored" (the CondLR step) by default. The projection of the core follows any of them.
    gradient : {"factors", "probe"}
        As in :class:`FixedRank`.

    References
    ----------
    D. Savostianova, E. Zangrando, G. Ceruti, F. Tudisco, *Robust low-rank training via approximate
    orthonormal constraints*, NeurIPS 2023. mathematics 4.2 and 5.
    """

    name = "WellConditioned"

    def __init__(
        self,
        m: int,
        n: int,
        rank: int,
        *,
        tau: float,
        centre: linalg.Centre = "metric",
        retraction: str | Callable[..., Tensor] = "factored",
        gradient: Gradient = "factors",
    ) -> None:
        super().__init__(m, n, rank, retraction=retraction, gradient=gradient)
        self.tau = check_number("tau", tau, low=0)
        check_choice("centre", centre, ("metric", "mean"))
        self.centre: linalg.Centre = centre

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tau={self.tau:g}, centre={self.centre!r}"

    def project_core(self, S: Tensor) -> Tensor:
        """The core with its spectrum clipped to a band of ratio 1 + tau."""
        return linalg.spectral_clip(S, self.tau, centre=self.centre)

    def _check_spectrum(self, s: Tensor, dtype: torch.dtype) -> None:
        # A deficient matrix has nearest points (the SVD's own bases); only zero has none.
        if bool((s[..., 0] <= 0).any()):
            raise ValueError("W must not be zero: it has no well-conditioned neighbour")

    def _check_core(self, s, *, atol, rtol):
        cond = (s[..., 0] / s[..., -1]).max().item()
        if cond > (1.0 + self.tau) * (1.0 + rtol) + atol:
            return False, (
                f"core S is not well-conditioned: cond(S) = {cond:.6g} > 1 + tau = {1 + self.tau:g}"
            )
        return True, None
