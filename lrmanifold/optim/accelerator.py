"""Whole networks in a few batches, for devices on which every call is a launch.

**Padding.** A weight of rank r continued by an identity, (U 0; 0 I), (S 0; 0 αI), (V 0; 0 I) with α
the root mean square of its singular values, is a point of a larger manifold whose added block never
moves: gradients vanish there, ‖S‖²/r and the penalty stay what they were. So weights of all sizes
and ranks are one batch, and rules need not know. Only traces of the clip, counts of Adam and square
bases need a mask (mathematics 9).

**Masks.** Nobody waits for the device: what a kernel cannot answer is NaN, and such a weight and
its state stay as they are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..factors import Factors, unpack
from ..manifolds import FixedRank, WellConditioned
from ..precision import compute_dtype
from .coordinates import is_factored
from .velocities import Velocities

# What a batch costs: its launches at 5 µs each, and its flops at the rate of small products.
_LAUNCHES, _LAUNCH, _RATE = 400, 5e-6, 1.5e13

_forced = False


@contextlib.contextmanager
def force_accelerator() -> Iterator[None]:
    """Within, optimizers move weights on the CPU the way accelerators do; for tests."""
    global _forced
    before, _forced = _forced, True
    try:
        yield
    finally:
        _forced = before


def is_accelerated(p: Tensor) -> bool:
    """Whether a parameter moves by launches and masks instead of by decisions."""
    return _forced or p.device.type != "cpu"


def may_be_padded(manifold: Any) -> bool:
    """Whether the kernels of this file know the set; others use their own `project_core`."""
    return type(manifold) in (FixedRank, WellConditioned) and is_factored(manifold)


class Padded(Velocities):
    """Points of several manifolds of one bundle key as one batch (k, m + r + n, r).

    Parameters
    ----------
    manifolds : sequence of FixedRank
        One a weight, equal but for their sizes.
    points : sequence of Tensor
        The weights, (..., m + r + n, r); leading dimensions are flattened.
    margin : float
    """

    def __init__(
        self, manifolds: Sequence[FixedRank], points: Sequence[Tensor], margin: float
    ) -> None:
        super().__init__(manifolds[0], margin)
        leads = [p[..., 0, 0].numel() for p in points]
        sets = [M for M, lead in zip(manifolds, leads, strict=True) for _ in range(lead)]
        dtype, device = compute_dtype(points[0].dtype), points[0].device
        self.sizes, self.leads = [p.numel() for p in points], leads
        self.r = max(M.rank for M in sets)
        self.m = max(M.m + self.r - M.rank for M in sets)
        self.n = max(M.n + self.r - M.rank for M in sets)

        def send(values: Any) -> Tensor:
            return torch.as_tensor(values, dtype=dtype).to(device)

        real = torch.stack([torch.arange(self.r) < M.rank for M in sets])
        self.valid = None if bool(real.all()) else send(real)
        self.ghost = send(torch.diag_embed(~real))
        self.ranks = send([M.rank for M in sets])[:, None, None]
        self.counts = send([[M.m * M.rank, M.rank**2, M.n * M.rank] for M in sets])
        turns = [[[M.m > M.rank], [M.n > M.rank]] for M in sets]
        # 1 where a basis can turn, 0 where it is square; None where all can.
        self.free = None if all(x for t in turns for (x,) in t) else send(turns)[:, :, None]
        owners = [i for i, lead in enumerate(leads) for _ in range(lead)]
        self.owners = None if max(leads) == 1 else torch.tensor(owners).to(device)
        # Rounding of half-precision storage may leave a core this much beyond its bound.
        self.slack = 1.0 if points[0].dtype == dtype else 1.03
        total = sum(self.sizes)
        index = torch.full((len(sets), self.m + self.r + self.n, self.r), total)
        back, at = [], 0
        for i, M in enumerate(sets):
            blocks = ((0, M.m), (self.m, M.rank), (self.m + self.r, M.n))
            rows = torch.cat([start + torch.arange(size) for start, size in blocks])
            count, ghost = len(rows) * M.rank, torch.arange(self.r - M.rank)
            index[i, rows, : M.rank] = at + torch.arange(count).view(-1, M.rank)
            for start, size in blocks[::2]:
                index[i, start + size + ghost, M.rank + ghost] = total + 1
            rows = i * index.shape[1] + rows
            back.append((rows[:, None] * self.r + torch.arange(M.rank)).flatten())
            at += count
        # Where each entry comes from in [all weights one after the other, 0, 1 or 0]; the way back.
        self.index, self.back = index.to(device), torch.cat(back).to(device)
        self.ends = send([[0.0, 0.0], [0.0, 1.0]]).unbind()

    # -- tensors and blocks

    def split(self, X: Tensor) -> Factors:
        """Blocks of a padded batch, views."""
        return unpack(X, self.m, self.n)

    def gather(self, tensors: Sequence[Tensor], *, point: bool = False) -> Tensor:
        """The padded batch of packed tensors; those of points are continued by an identity."""
        dtype = self.counts.dtype
        flat = [t.reshape(-1).to(dtype) for t in tensors]
        X = torch.take(torch.cat([*flat, self.ends[int(point)]]), self.index)
        if point and self.valid is not None:
            S = self.split(X).S
            alpha = torch.linalg.vector_norm(S, dim=(-2, -1), keepdim=True) * self.ranks.rsqrt()
            S.addcmul_(self.ghost, alpha)
        return X

    def scatter(self, X: Tensor, count: int) -> Sequence[Tensor]:
        """The packed tensors of a padded batch, flat."""
        return torch.take(X, self.back).split(self.sizes)

    def gather_moments(self, tensors: Sequence[Tensor], *, point: bool = False) -> Tensor:
        """Second moments of all points, (k, 3)."""
        return torch.cat([t.reshape(-1, 3) for t in tensors])

    def scatter_moments(self, X: Tensor, count: int) -> Sequence[Tensor]:
        """The inverse of :meth:`gather_moments`, up to leading dimensions."""
        return X.split(self.leads)

    def each_moment(self, x: Tensor) -> Tensor:
        """A number a weight against the second moments of its points."""
        return self._each(x)[:, None]

    def finite(self, X: Tensor, count: int) -> Tensor:
        """Which weights hold no NaN and no Inf in any of their points, (count,)."""
        ok = torch.linalg.vector_norm(X, math.inf, dim=(-2, -1)) < math.inf
        if self.owners is None:
            return ok
        one = torch.ones(count, dtype=torch.int8, device=ok.device)
        return one.scatter_reduce(0, self.owners, ok.to(torch.int8), "amin").bool()

    def mask(self, ok: Tensor, like: Tensor) -> Tensor:
        """A flag a weight against a gathered tensor."""
        return self._each(ok).view(-1, *(1,) * (like.ndim - 1))

    def _each(self, x: Tensor) -> Tensor:
        return x if self.owners is None else x[self.owners]

    # -- kernels

    @property
    def _kappa(self) -> float | None:
        tau = getattr(self.manifold, "tau", None)
        return None if tau is None else (1.0 + tau) * self.slack

    def project_core(self, S: Tensor) -> Tensor:
        tau: Any = getattr(self.manifold, "tau", None)
        scale: Any = getattr(self.manifold, "scale", None)
        if tau is None:
            return S
        if scale == "free":
            mean = self.manifold.centre == "mean"
            return linalg.clip_by_products(S, tau, margin=self.margin, mean=mean, valid=self.valid)
        if tau == 0.0:
            C = linalg.clip_by_products(S, 0.0, valid=self.valid)
            # All singular values are equal by now, those of the padding too.
            norm = torch.linalg.vector_norm(C, dim=(-2, -1), keepdim=True)
            return C * (float(scale) * self.r**0.5 / norm)
        band = (float(scale) / (1.0 + tau), float(scale))
        return linalg.clip_by_products(S, tau, band=band, valid=self.valid)

    def polars(self, Y_u: Tensor, Y_v: Tensor) -> tuple[Tensor, Tensor]:
        return linalg.polar_pair(Y_u, Y_v)

    def decompositions(self, X: Factors, Y_u: Tensor, Y_v: Tensor) -> tuple[Tensor, ...]:
        Q, P = self.polars(Y_u, Y_v)
        return Q, P, torch.bmm(Q.mT, X.U), torch.bmm(P.mT, X.V)

    def perp(self, Q: Tensor, Z: Tensor, side: int, out: Tensor | None = None) -> Tensor:
        return self._freed(torch.baddbmm(Z, Q, torch.bmm(Q.mT, Z), alpha=-1.0, out=out), side)

    def outside(self, Q: Tensor, Z: Tensor, B: Tensor, overlap: Tensor, side: int) -> Tensor:
        return self._freed(super().outside(Q, Z, B, overlap, side), side)

    def _freed(self, Z: Tensor, side: int) -> Tensor:
        # Roundoff of a square basis would be blown up to unit size by Adam.
        return Z if self.free is None else Z.mul_(self.free[:, side])

    def _inverse(self, S: Tensor) -> Tensor:
        if self._kappa is None or self._kappa > linalg.SERIES_LIMIT:
            return torch.linalg.inv_ex(S)[0]
        return torch.bmm(S.mT, linalg.inverse_grams(S, self._kappa)[0])

    def inverse_grams(self, S: Tensor) -> tuple[Tensor, Tensor]:
        if self._kappa is None or self._kappa > linalg.SERIES_LIMIT:
            inverse = self.inverse(S)
            return torch.bmm(inverse.mT, inverse), torch.bmm(inverse, inverse.mT)
        A_u, A_v = linalg.inverse_grams(S, self._kappa).unbind()
        return A_u, A_v

    def _counts(self, like: Tensor) -> Tensor:
        return self.counts


class Flat:
    """Ordinary parameters one behind the other, as one vector."""

    low_rank = False

    def __init__(self, points: Sequence[Tensor]) -> None:
        self.sizes = [p.numel() * (2 if p.is_complex() else 1) for p in points]
        self.dtype = compute_dtype(real_view(points[0]).dtype)
        # of the CPU whatever the default device is; older torch needs the size on the meta device
        owners = None
        if len(points) > 1:
            sizes = torch.tensor(self.sizes, device="cpu")
            owners = torch.repeat_interleave(sizes, output_size=sum(self.sizes))
        self.owners = None if owners is None else owners.to(points[0].device)

    def split(self, X: Tensor) -> Tensor:
        return X

    join = split

    def gather(self, tensors: Sequence[Tensor], *, point: bool = False) -> Tensor:
        """One vector of all entries; real and imaginary parts of complex ones."""
        flat = [real_view(t).reshape(-1).to(self.dtype) for t in tensors]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def scatter(self, X: Tensor, count: int) -> Sequence[Tensor]:
        """The flat parts of a vector of all entries."""
        return X.split(self.sizes)

    gather_moments, scatter_moments = gather, scatter

    def each_moment(self, x: Tensor) -> Tensor:
        """A number a weight against all entries."""
        return x[0] if self.owners is None else x[self.owners]

    def finite(self, X: Tensor, count: int) -> Tensor:
        """Which parameters hold no NaN and no Inf, (count,)."""
        return torch.stack(torch._foreach_norm(X.split(self.sizes), math.inf)) < math.inf

    def mask(self, ok: Tensor, like: Tensor) -> Tensor:
        """A flag a weight against all entries."""
        return self.each_moment(ok)


def real_view(t: Tensor) -> Tensor:
    """Real and imaginary parts of a complex tensor side by side, as torch's optimizers see it."""
    return torch.view_as_real(t) if t.is_complex() else t


def partition(manifolds: Sequence[FixedRank]) -> list[list[int]]:
    """Indices of weights in padded batches: as few as pay.

    A batch costs its launches and the flops of its padded size. Sorted by size, the best cuts by
    dynamic programming.
    """
    tall = [M.m + M.n for M in manifolds]
    order = sorted(range(len(manifolds)), key=lambda i: (manifolds[i].rank, tall[i]))
    best: list[tuple[float, list[list[int]]]] = [(0.0, [])]
    for j in range(1, len(order) + 1):
        options, r = [], 0
        for i in range(j - 1, -1, -1):
            r = max(r, manifolds[order[i]].rank)
            rows = max(tall[k] + 2 * (r - manifolds[k].rank) for k in order[i:j])
            flops = (j - i) * (14.0 * rows * r**2 + 800.0 * r**3)
            cost = best[i][0] + _LAUNCHES * _LAUNCH + flops / _RATE
            options.append((cost, i))
        cost, i = min(options)
        best.append((cost, [*best[i][1], order[i:j]]))
    return best[-1][1]
