"""Fine-tuning a frozen dense weight by a well-conditioned low-rank update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import linalg
from ..factors import unpack
from .linear import LowRankLinear


class LowRankAdapter(nn.Module):
    r"""A frozen ``nn.Linear`` plus a trained update ΔW = U S Vᵀ - U₀ S₀ V₀ᵀ that starts at zero.

    **Zero start and a condition number.** A product B A that starts at B = 0 (LoRA) has no
    condition number at the start and any one later. Here what is trained is the point U S Vᵀ of
    :class:`~lrmanifold.WellConditioned`, with cond <= 1 + τ from the first step to the last, and
    the point it started from is subtracted. At the start the two terms are computed by the same
    operations on the same numbers: the layer's output is *to the bit* that of the dense layer, in
    every dtype, and the frozen weight is never rewritten. The price is a second thin product, 2 b
    (m + n) r flops more for a batch of b; :meth:`merge` removes both.

    What the bound says and what not: cond(U S Vᵀ) <= 1 + τ keeps all r directions of the adapter
    in use and its gradients of one scale. ΔW itself has rank up to 2r and no bound, neither has
    W + ΔW.

    The size of S₀ does not scale the learning rate (the Riemannian step acts on the matrix U S Vᵀ),
    but how fast bases turn: a step of size ‖ξ‖ turns them by about ‖ξ‖/σ.

    Parameters
    ----------
    dense : nn.Linear
        Its parameters are taken themselves, not copied, and frozen.
    rank : int
        In 1..min(in_features, out_features).
    tau : float or None
        The condition number of U S Vᵀ stays at most 1 + tau; None for no bound.
    init : {"random", "svd"}
        Where U S Vᵀ starts: Haar-uniform bases and a multiple of the identity, the root mean square
        of W's singular values; or the leading singular directions of W, projected to the bound.
    dtype : torch.dtype, optional
        Of the update, the dense layer's by default; float32 beside a bfloat16 weight, say.
    **geometry
        `gradient` and `retraction` of :class:`LowRankLinear`.

    Attributes
    ----------
    weight, bias : nn.Parameter
        Of the dense layer; keys of the state dict as there, so its checkpoints load
        (``strict=False``).
    update : LowRankLinear
        The trained point U S Vᵀ.
    start : Tensor, shape (m + r + n, r)
        Buffer: the point at the start, packed.

    Notes
    -----
    Weight decay on ``update.weight`` would pull U S Vᵀ to zero, that is ΔW to -U₀ S₀ V₀ᵀ: leave it
    at 0.

    Examples
    --------
    >>> model.fc1 = lrmanifold.nn.LowRankAdapter(model.fc1, rank=8)
    >>> optimizer = lrmanifold.optim.CondLR(model.fc1.parameters(), lr=0.05)
    >>> model.fc1 = model.fc1.merge()  # an nn.Linear again
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    start: Tensor

    def __init__(
        self,
        dense: nn.Linear,
        rank: int,
        *,
        tau: float | None = 0.1,
        init: str = "random",
        dtype: torch.dtype | None = None,
        **geometry: Any,
    ) -> None:
        super().__init__()
        if not isinstance(dense, nn.Linear):
            raise TypeError(f"dense must be a Linear, got {type(dense).__name__}")
        if init not in ("random", "svd"):
            raise ValueError(f"init must be 'random' or 'svd', got {init!r}")
        self.in_features, self.out_features = dense.in_features, dense.out_features
        update = LowRankLinear(
            self.in_features,
            self.out_features,
            rank,
            bias=False,
            tau=tau,
            device=dense.weight.device,
            dtype=dtype or dense.weight.dtype,
            **geometry,
        )
        if not dense.weight.is_meta:
            _place(update, dense.weight.detach(), init)
        # Frozen last: an error above leaves the dense layer as it was.
        dense.requires_grad_(False)
        self.register_parameter("weight", dense.weight)  # type: ignore[arg-type]
        self.register_parameter("bias", dense.bias)  # type: ignore[arg-type]
        self.update = update
        self.register_buffer("start", update.weight.detach().as_subclass(Tensor).clone())
        self.train(dense.training)

    @property
    def rank(self) -> int:
        """Rank of the trained point; ΔW has up to twice as much."""
        return self.update.rank

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + (U S Vᵀ - U₀ S₀ V₀ᵀ) x for x of shape (..., in_features)."""
        y = F.linear(x, self.weight, self.bias)
        x = x.to(self.start.dtype)
        U, S, V = unpack(self.start, self.out_features, self.in_features)
        before = self.update._last(self.update._first(x, V), U, S, None)
        return y + (self.update(x) - before).to(y.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update ΔW, dense, shape (out_features, in_features), in at least float32."""
        wide = linalg.compute_dtype(self.start.dtype)
        now, start = (
            unpack(X.detach().to(wide), self.out_features, self.in_features)
            for X in (self.update.weight, self.start)
        )
        left = torch.cat((now.U @ now.S, -start.U @ start.S), -1)
        return left @ torch.cat((now.V, start.V), -1).mT

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The ``nn.Linear`` with the same function, of weight W + ΔW, trainable again.

        This layer stays as it is. The sum is formed in at least float32 and rounded once.
        """
        W, delta = self.weight, self.delta()
        merged = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=W.device,
            dtype=W.dtype,
        )
        merged.weight.copy_(W.to(torch.promote_types(W.dtype, delta.dtype)) + delta)
        if self.bias is not None:
            merged.bias.copy_(self.bias)
        return merged.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


@torch.no_grad()
def _place(update: LowRankLinear, W: Tensor, init: str) -> None:
    """Give `update` its start; nothing but `update` is written."""
    if not bool(torch.isfinite(W).all()):
        raise ValueError("dense.weight must be finite, got NaN or Inf")
    M, wide = update.manifold, torch.promote_types(W.dtype, torch.float32)
    W = W.to(wide)
    if init == "svd":
        update.weight.copy_(M.from_dense(W))
        return
    size = float(torch.linalg.matrix_norm(W)) / min(M.m, M.n) ** 0.5
    if size > 0:  # of a zero weight, the size of a fresh layer
        S = M.unpack(update.weight.data).S
        S.copy_(size * torch.eye(M.rank, dtype=S.dtype, device=S.device))
