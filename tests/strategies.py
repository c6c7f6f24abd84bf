"""What hypothesis draws: sizes, batches, dtypes, and points and cores of prescribed spectrum.

Tensors are not drawn entry by entry but from a drawn seed: what matters to the claims are sizes,
gauges and singular values, and those are prescribed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import lrmanifold as lrm

#: (m, n, r): tall, wide, square, r = 1, r = min(m, n) on both sides, m < 2r, n < 2r.
SHAPES = ((7, 5, 3), (5, 9, 2), (6, 6, 1), (4, 7, 4), (7, 4, 4), (5, 5, 5), (5, 4, 3), (12, 10, 4))
shapes = st.sampled_from(SHAPES)
batches = st.sampled_from(((), (2,), (2, 3)))
dtypes = st.sampled_from((torch.float64, torch.float32))
seeds = st.integers(0, 2**31 - 1)
taus = st.sampled_from((0.0, 1e-3, 0.1, 0.5, 1.0, 10.0))
conditions = st.sampled_from((1e0, 1e1, 1e2, 1e4, 1e6))
spectra = st.sampled_from(("random", "geometric", "clustered", "one small", "one big"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def orthonormal(*shape: int, seed: int) -> Tensor:
    """Orthonormal columns by LAPACK's QR, float64."""
    return torch.linalg.qr(gaussian(*shape, seed=seed)).Q


def spectrum(kind: str, r: int, cond: float, seed: int, batch: tuple[int, ...] = ()) -> Tensor:
    """Decreasing singular values from 1 to 1/cond, both attained, shape (*batch, r), float64."""
    place = torch.rand(*batch, r, generator=generator(seed), dtype=torch.float64)
    place = place.sort(-1, descending=True).values
    if kind == "clustered":  # two clusters, each about as narrow as float32 can tell
        place = place.round() * (1 - 1e-7) + 1e-7 * place
    elif kind == "one small":
        place = torch.ones_like(place)
    elif kind == "one big":
        place = torch.zeros_like(place)
    place[..., -1], place[..., 0] = 0.0, 1.0
    low = 1.0 / cond
    return low ** (1.0 - place) if kind == "geometric" else low + (1.0 - low) * place


def matrix(s: Tensor, m: int, seed: int, n: int | None = None) -> Tensor:
    """A random m x n matrix (n = r by default) with singular values `s`, float64."""
    *batch, r = s.shape
    left = orthonormal(*batch, m, r, seed=seed)
    right = orthonormal(*batch, r if n is None else n, r, seed=seed + 1)
    return (left * s[..., None, :]) @ right.mT


class Core(NamedTuple):
    S: Tensor
    cond: float
    seed: int


@st.composite
def cores(draw, sizes=(1, 2, 3, 5, 8, 20), conds=conditions, dtypes=dtypes) -> Core:
    """A batch of r x r cores with a prescribed condition number, at any scale."""
    r, batch, seed = draw(st.sampled_from(sizes)), draw(batches), draw(seeds)
    cond = draw(conds)
    scale = draw(st.sampled_from((1.0, 1e-6, 1e6)))
    s = spectrum(draw(spectra), r, cond, seed, batch)
    return Core((scale * matrix(s, r, seed)).to(draw(dtypes)), cond, seed)


class Point(NamedTuple):
    manifold: lrm.FixedRank
    X: Tensor
    xi: Tensor
    seed: int

    def another(self) -> Tensor:
        """A second point of the manifold, of the same shape."""
        m, n, r = self.manifold.m, self.manifold.n, self.manifold.rank
        return packed_point(m, n, r, self.X.shape[:-2], 10.0, self.seed + 77).to(self.X.dtype)

    def vector(self, k: int) -> Tensor:
        """The k-th further tangent vector at X."""
        noise = gaussian(*self.X.shape, seed=self.seed + 1000 + k, dtype=self.X.dtype)
        return self.manifold.proju(self.X, noise)


def packed_point(m: int, n: int, r: int, batch: tuple[int, ...], cond: float, seed: int) -> Tensor:
    """(U, S, V) packed by hand, the core of prescribed condition number and σ_max = 1; float64."""
    U, V = orthonormal(*batch, m, r, seed=seed + 2), orthonormal(*batch, n, r, seed=seed + 3)
    return torch.cat((U, matrix(spectrum("random", r, cond, seed, batch), r, seed), V), -2)


moderate = st.sampled_from((1e0, 1e1, 1e3))


@st.composite
def points(draw, conds=moderate, dtypes=dtypes, **options) -> Point:
    """A :class:`lrmanifold.FixedRank`, a batch of points, tangent vectors of norm about 1."""
    (m, n, r), batch, seed = draw(shapes), draw(batches), draw(seeds)
    manifold = lrm.FixedRank(m, n, r, **options)
    X = packed_point(m, n, r, batch, draw(conds), seed).to(draw(dtypes))
    xi = manifold.proju(X, gaussian(*X.shape, seed=seed + 4, dtype=X.dtype))
    return Point(manifold, X, xi / (m + n), seed)
