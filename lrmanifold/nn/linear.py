"""Low-rank fully connected layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import check_choice, check_flag, check_integer
from ..manifolds.fixed_rank import Gradient
from ._obstacles import check_dense
from .layer import INITS, LowRankLayer, make_manifold

# torch 2.6 cannot tell exporting from compiling.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class LowRankLinear(LowRankLayer):
    """``y = U S Vᵀ x + b`` with a well-conditioned low-rank weight; drop-in for ``nn.Linear``.

    Three thin products, 2 b (m + r + n) r flops for a batch of b; the dense matrix is never formed.

    In the place of ``linear1`` or ``linear2`` of an ``nn.TransformerEncoderLayer`` put it by
    :func:`lrmanifold.factorize`. By hand, torch's fused kernel would read the packed weight as a
    dense one and fail on its shape: set ``activation_relu_or_gelu = 0`` of that encoder layer.

    Parameters
    ----------
    in_features, out_features : int
        n and m of the weight matrix.
    rank : int
        In 1..min(m, n). The layer is smaller than the dense one while (m + r + n) r < m n.
    bias : bool
    tau : float or None
        The condition number of the weight stays at most 1 + tau; None for no bound.
    gradient : {"factors", "probe"}
        "probe" takes gradients without the inverse of S, at twice the forward products: for
        ``tau=None`` with tiny or zero singular values (mathematics 1).
    retraction : str, optional
        One of :func:`lrmanifold.retractions.available`; "factored" by default ("bug" for
        ``tau=None`` with probes).
    scale : "free" or float
        A number is an upper bound of the spectral norm, and at tau = 0 its value, for the whole
        training; see :class:`~lrmanifold.WellConditioned`.
    device, dtype
        As in torch.

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type or is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        tau: float | None = 0.1,
        gradient: Gradient = "factors",
        retraction: str | None = None,
        scale: float | str = "free",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_features = check_integer("in_features", in_features, low=1)
        out_features = check_integer("out_features", out_features, low=1)
        bias = check_flag("bias", bias)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        manifold = make_manifold(
            out_features,
            in_features,
            rank,
            tau=tau,
            gradient=gradient,
            retraction=retraction,
            scale=scale,
        )
        super().__init__(manifold, (), **factory)
        self.in_features, self.out_features = in_features, out_features
        self._register_bias(out_features if bias else None, **factory)
        self.reset_parameters()

    def _first(self, x: Tensor, V: Tensor) -> Tensor:
        # not mT, here and in the other forwards: export through TorchScript does not know it
        return F.linear(x, V.transpose(-2, -1))

    def _last(self, z: Tensor, U: Tensor, S: Tensor | None, bias: Tensor | None) -> Tensor:
        if S is None:
            return F.linear(z, U, bias)
        # U S costs m r², z Sᵀ a row r² each: the cheaper one. An exported graph must not depend on
        # the size of the batch; there U S is a constant.
        if is_exporting() or z.numel() > U.numel():
            return F.linear(z, U @ S, bias)
        return F.linear(F.linear(z, S), U, bias)

    @classmethod
    def from_dense(
        cls, module: nn.Linear, rank: int, *, init: str = "svd", **geometry: Any
    ) -> LowRankLinear:
        """A low-rank layer from a dense one.

        Parameters
        ----------
        module : nn.Linear
        rank : int
        init : {"svd", "random"}
            Truncated SVD of the weight, then the projection to cond <= 1 + tau; or fresh random
            values. The bias is copied in either case.
        **geometry
            `tau`, `gradient`, `retraction` and `scale` of the constructor.

        Returns
        -------
        LowRankLinear
            With the dtype, device, mode and ``requires_grad`` of `module`.
        """
        check_dense("module", module, nn.Linear)
        check_choice("init", init, INITS)
        layer = cls(
            module.in_features,
            module.out_features,
            rank,
            module.bias is not None,
            **geometry,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        layer._take_over(module, init)
        return layer

    def to_dense(self) -> nn.Linear:
        """The ``nn.Linear`` with the same function."""
        U, _, V = self.factors
        dense = nn.Linear(
            V.shape[-2], U.shape[-2], self.bias is not None, device=U.device, dtype=U.dtype
        )
        self._hand_over(dense)
        return dense

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._geometry_repr()}"
        )
