"""Fixed-rank matrices whose condition number is bounded."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Literal

import torch
from torch import Tensor

from .. import linalg
from .._arguments import check_choice, check_number
from ..precision import without_autocast
from .fixed_rank import FixedRank, Gradient

Scale = float | Literal["free"]


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
    scale : "free" or float
        A number s > 0 fixes the size too: the singular values stay in [s/(1 + tau), s], so
        ‖W‖₂ <= s always, and with tau = 0 W is s times a partial isometry. The core is then
        brought back entry by entry of its spectrum (the exact Frobenius projection), whatever
        `centre` is. "free" bounds the ratio of the singular values only.

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
        scale: Scale = "free",
    ) -> None:
        super().__init__(m, n, rank, retraction=retraction, gradient=gradient)
        self.tau = check_number("tau", tau, low=0)
        check_choice("centre", centre, ("metric", "mean"))
        if scale != "free":
            scale = check_number("scale", scale, low=0, open_low=True, hint="or 'free'")
        self.centre: linalg.Centre = centre
        self.scale: Scale = scale

    def extra_repr(self) -> str:
        scale = "" if self.scale == "free" else f", scale={self.scale:g}"
        return f"{super().extra_repr()}, tau={self.tau:g}, centre={self.centre!r}{scale}"

    @property
    def bundle_key(self) -> Hashable:
        """As :attr:`FixedRank.bundle_key`; bound, centre and scale count too."""
        if type(self) is not WellConditioned:
            return id(self)
        return (type(self), *self._kind(), self.tau, self.centre, self.scale)

    @without_autocast
    def project_core(self, S: Tensor, *, margin: float = 0.0) -> Tensor:
        """The core with its spectrum clipped to a band of ratio 1 + tau, below `scale` if fixed.

        `margin` is that of :func:`lrmanifold.linalg.spectral_clip`; a fixed band has none.
        """
        if self.scale == "free":
            return linalg.spectral_clip(S, self.tau, centre=self.centre, margin=margin)
        if S.device.type == "cpu" and not bool(S.any(-1).any(-1).all()):
            raise ValueError("S must not be the zero matrix: every direction is as near to it")
        if self.tau == 0.0:
            return self.scale * linalg.polar(S, rank_deficient=True)
        U, s, Vh = linalg.svd(S)
        clipped = self.project_spectrum(s)
        # what is inside stays as it is, to the bit
        inside = (clipped == s).all(-1)[..., None, None]
        return torch.where(inside, S, ((U * clipped[..., None, :]) @ Vh).to(S.dtype))

    def project_spectrum(self, s: Tensor) -> Tensor:
        if self.scale == "free":
            return linalg.clip_values(s, self.tau, centre=self.centre)
        return s.clamp(self.scale / (1.0 + self.tau), self.scale)

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
        if self.scale == "free":
            return True, None
        low, high = s[..., -1].min().item(), s[..., 0].max().item()
        slack = 1.0 + rtol + atol
        if high > self.scale * slack or low * slack * (1.0 + self.tau) < self.scale:
            return False, (
                f"core S has singular values in [{low:.6g}, {high:.6g}], outside "
                f"[scale/(1 + tau), scale] = [{self.scale / (1 + self.tau):g}, {self.scale:g}]"
            )
        return True, None

    def origin(self, *size, dtype=None, device=None, seed: int | None = 42):
        """As :meth:`FixedRank.origin`, with S = scale I if that is fixed."""
        X = super().origin(*size, dtype=dtype, device=device, seed=seed)
        if self.scale != "free":
            self.unpack(X).S.mul_(self.scale)
        return X
