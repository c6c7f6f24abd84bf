"""Low-rank table of embeddings."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import linalg
from .._arguments import check_choice, check_integer
from ..manifolds.fixed_rank import Gradient
from ..precision import without_autocast
from ._obstacles import check_dense, embedding_defect
from .layer import INITS, LowRankLayer, make_manifold
from .linear import is_exporting


class LowRankEmbedding(LowRankLayer):
    """Drop-in for ``nn.Embedding`` with a table U S Vᵀ: a lookup in U, then a product with S Vᵀ.

    The table has (m + r + n) r entries for m words of n numbers each, and a lookup costs r (r + n)
    a word. Its weight may be shared with a :class:`LowRankLinear` of as many inputs and outputs: a
    language model's tied head.

    `max_norm`, `scale_grad_by_freq` and `sparse` of torch's layer are not offered: the first
    rewrites rows of the table, the others change or compress the gradient of rows, and none of
    that stays on the manifold.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        m and n of the table.
    rank : int
        In 1..min(m, n); with `padding_idx` in 1..min(m - 1, n), as the other rows hold the basis.
    padding_idx : int, optional
        This word gives no gradient to U. Its row is zero at the start. A row that is zero stays
        zero: exactly with the retractions "factored", the default, and "orthographic"; with the
        others, in :class:`~lrmanifold.optim.DLRT` and in averages but for rounding, which
        decompositions spread over all rows and which adds up over the steps. A row that is not
        zero, taken over from a dense table, moves with the basis.
    tau : float or None
        The condition number of the table stays at most 1 + tau; None for no bound.
    gradient, retraction, scale
        As in :class:`LowRankLinear`.
    device, dtype
        As in torch.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type or is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        *,
        tau: float | None = 0.1,
        gradient: Gradient = "factors",
        retraction: str | None = None,
        scale: float | str = "free",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        m = check_integer("num_embeddings", num_embeddings, low=1)
        n = check_integer("embedding_dim", embedding_dim, low=1)
        if padding_idx is not None:
            padding_idx = check_integer("padding_idx", padding_idx, low=-m, high=m - 1) % m
        manifold = make_manifold(
            m, n, rank, tau=tau, gradient=gradient, retraction=retraction, scale=scale
        )
        if padding_idx is not None and manifold.rank == m:
            raise ValueError(
                f"rank must be at most num_embeddings - 1 = {m - 1} with padding_idx, got {rank}: "
                "the row of that word is zero, and so many columns need all rows"
            )
        super().__init__(manifold, (), device=device, dtype=dtype)
        self.num_embeddings, self.embedding_dim = m, n
        self.padding_idx = padding_idx
        self._register_bias(None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Haar-uniform bases, entries of variance 1 as in torch; the padding row is zero."""
        if self.weight.is_meta:
            return
        M = self.manifold
        with torch.no_grad():
            dtype = linalg.compute_dtype(self.weight.dtype)
            X = M.random(*self.weight.shape, dtype=dtype, device=self.weight.device)
            scale = getattr(M, "scale", "free")
            size = (M.m * M.n / M.rank) ** 0.5 if scale == "free" else scale
            S = float(size) * torch.eye(M.rank, dtype=dtype, device=X.device)
            U, _, V = M.unpack(X)
            # the rank of a loaded table may be m: then no row can be left out
            if self.padding_idx is not None and M.m > M.rank:
                U = U.clone()
                U[self.padding_idx] = 0.0
                U = linalg.polar(U)
            self.weight.copy_(M.pack(U, S, V))

    @without_autocast  # as torch's lookup, which starts a residual stream in full precision
    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table for integers of any shape (...), shape (..., embedding_dim).

        In the dtype of the table, within autocast too.
        """
        U, S, V = self.factors
        if self.manifold.gradient == "probe" and torch.is_grad_enabled():
            # the probes of LowRankLayer, with rows in the place of inputs
            U_, V_ = U.detach(), V.detach()
            rows = self._lookup(ids, U_)
            y = F.linear(rows, V_ @ S.transpose(-2, -1)) + F.linear(self._lookup(ids, U - U_), V_)
            return y + F.linear(rows, V - V_)
        rows = self._lookup(ids, U)
        # V Sᵀ costs n r², a row times S r²: the cheaper one, but for exported graphs
        if is_exporting() or rows.numel() > V.numel():
            return F.linear(rows, V @ S.transpose(-2, -1))
        return F.linear(rows @ S, V)

    def _lookup(self, ids: Tensor, U: Tensor) -> Tensor:
        return F.embedding(ids, U, self.padding_idx)

    @classmethod
    def from_dense(
        cls, module: nn.Embedding, rank: int, *, init: str = "svd", **geometry: Any
    ) -> LowRankEmbedding:
        """A low-rank table from a dense one.

        Parameters
        ----------
        module : nn.Embedding
        rank : int
        init : {"svd", "random"}
        **geometry
            As in :meth:`LowRankLinear.from_dense`.

        Raises
        ------
        ValueError
            If `module` has `max_norm`, `scale_grad_by_freq` or `sparse`, or the rank is too large.
        """
        check_dense("module", module, nn.Embedding)
        check_choice("init", init, INITS)
        if reason := embedding_defect(module):
            raise ValueError(f"module must be a plain Embedding, but {reason}")
        layer = cls(
            module.num_embeddings,
            module.embedding_dim,
            rank,
            module.padding_idx,
            **geometry,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        layer._take_over(module, init)
        return layer

    def _nearest(self, matrix: Tensor) -> Tensor:
        M, pad = self.manifold, self.padding_idx
        if pad is None or bool(matrix[pad].any()):
            return M.from_dense(matrix)
        # without that row: the basis of a deficient table may lean on it
        others = copy.copy(M)
        others.m = M.m - 1
        X = others.from_dense(torch.cat((matrix[:pad], matrix[pad + 1 :])))
        return torch.cat((X[:pad], X.new_zeros(1, M.rank), X[pad:]))

    def to_dense(self) -> nn.Embedding:
        """The ``nn.Embedding`` with the same table."""
        weight = self.weight
        # without storage first: torch would draw numbers for a table that is overwritten
        dense = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        dense.weight = nn.Parameter(
            weight.new_empty(self.num_embeddings, self.embedding_dim).as_subclass(Tensor)
        )
        self._hand_over(dense)
        return dense

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """(num_embeddings, embedding_dim)."""
        return self.num_embeddings, self.embedding_dim

    def extra_repr(self) -> str:
        pad = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{pad}, {self._geometry_repr()}"
