"""Low-rank fully connected layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._layer import LowRankLayer, make_manifold


class LowRankLinear(LowRankLayer):
    """``y = U S Vᵀ x + b`` with a well-conditioned low-rank weight; drop-in for ``nn.Linear``.

    Three thin products, 2 b (m + r + n) r flops for a batch of b; the dense matrix is never formed.

    Parameters
    ----------
    in_features, out_features : int
        n and m of the weight matrix.
    rank : int
        In 1..min(m, n). The layer is smaller than the dense one while (m + r + n) r < m n.
    bias : bool
    tau : float or None
        The condition number of the weight stays at most 1 + tau; None for no bound.
    device, dtype
        As in torch.

    Raises
    ------
    ValueError
        If rank or tau are out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        tau: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(make_manifold(out_features, in_features, rank, tau), (), **factory)
        self.in_features, self.out_features = in_features, out_features
        self._register_bias(out_features if bias else None, **factory)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., in_features) to (..., out_features)."""
        U, S, V = self.factors
        return F.linear(F.linear(F.linear(x, V.mT), S), U, self.bias)

    @classmethod
    def from_dense(
        cls, module: nn.Linear, rank: int, *, tau: float | None = 0.1, init: str = "svd"
    ) -> LowRankLinear:
        """A low-rank layer from a dense one.

        Parameters
        ----------
        module : nn.Linear
        rank : int
        tau : float or None
        init : {"svd", "random"}
            Truncated SVD of the weight, then the projection to cond <= 1 + tau; or fresh random
            values. The bias is copied in either case.

        Returns
        -------
        LowRankLinear
            With the dtype, device, mode and ``requires_grad`` of `module`.
        """
        layer = cls(
            module.in_features,
            module.out_features,
            rank,
            module.bias is not None,
            tau=tau,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        layer._take_over(module, module.weight, init)
        return layer

    def to_dense(self) -> nn.Linear:
        """The ``nn.Linear`` with the same function."""
        U, _, V = self.factors
        dense = nn.Linear(
            V.shape[-2], U.shape[-2], self.bias is not None, device=U.device, dtype=U.dtype
        )
        self._hand_over(dense)
        return dense

    def dense_weight(self) -> Tensor:
        """The matrix U S Vᵀ, shape (out_features, in_features), with gradients."""
        return self.manifold.to_dense(self.weight)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._geometry_repr()}"
        )

