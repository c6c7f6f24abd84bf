"""Blocks with a known Lipschitz constant: patches as channels, residual sums, convex potentials."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._arguments import check_callable, check_integer, check_module
from .linear import LowRankLinear


class Patchify(nn.Module):
    """Space to depth: (B, C, H, W) to (B, C s², H/s, W/s), each s x s patch becoming channels.

    A permutation of entries, so an isometry. A 1 x 1 convolution after it is a convolution whose
    stride is its kernel size: the only kind whose norm as a map on images is exactly that of its
    matrix, without iteration.

    Parameters
    ----------
    size : int
        s, at least 1. Height and width must be multiples of it.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = check_integer("size", size, low=1)

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError unless height and width are multiples of the patch size."""
        if x.ndim < 3 or x.shape[-1] % self.size or x.shape[-2] % self.size:
            raise ValueError(
                f"x must have shape (..., C, H, W) with H and W multiples of {self.size}, got "
                f"{tuple(x.shape)}"
            )
        return nn.functional.pixel_unshuffle(x, self.size)

    def extra_repr(self) -> str:
        return str(self.size)


class Residual(nn.Module):
    """``x + block(x)``; certified at 1 + L, L the block's Lipschitz constant.

    Parameters
    ----------
    *blocks : nn.Module
        Run one after another; the last output must have the shape of the input.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("Residual needs at least one module")
        for i, block in enumerate(blocks):
            check_module(f"blocks[{i}]", block)
        self.block = blocks[0] if len(blocks) == 1 else nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        y = self.block(x)
        # broadcasting would be another function than the sum, with another constant
        if y.shape != x.shape:
            raise ValueError(
                f"the block must keep the shape {tuple(x.shape)}, it gave {tuple(y.shape)}"
            )
        return x + y


class ConvexPotential(nn.Module):
    r"""``x - 2 Qᵀ σ(Q x + b)`` with ``Q = W / ‖W‖₂``: 1-Lipschitz for every W of any rank.

    One explicit Euler step of the gradient flow of a convex potential. Its Jacobian is
    :math:`I - 2 Q^\top D Q` with :math:`0 \le D \le I`, so its eigenvalues lie in [-1, 1]. W is the
    low-rank weight of `layer` and b its bias; with τ = 0 its norm is :math:`\|S\|_F/\sqrt r`,
    free and differentiable, and the layer changes a signal in r directions only, losing none.

    Parameters
    ----------
    features : int
        Size n of the input and output.
    rank : int
        In 1..min(features, hidden).
    hidden : int, optional
        Rows m of W; `features` by default. With ``hidden=rank``, τ = 0 and ReLU, Q has orthonormal
        rows, so every Jacobian is a reflection (its square is :math:`I`): the layer folds space
        along r directions, stretches nothing and loses nothing, and a network of such layers has a
        local constant as large as its bound. That is what certifies best (docs/certification.md).
    tau : float
        As in :class:`LowRankLinear`.
    activation : callable, optional
        σ: nondecreasing and 1-Lipschitz, elementwise; ReLU by default. Certification knows ReLU,
        LeakyReLU (slope in [0, 1]), Tanh, Sigmoid, Softsign, Hardtanh and ReLU6 modules.
    scale : "free" or float
        As in :class:`~lrmanifold.WellConditioned`. With 1.0 and τ = 0, Q is W itself.

    Attributes
    ----------
    layer : LowRankLinear

    References
    ----------
    L. Meunier, B. Delattre, A. Araujo, A. Allauzen, *A dynamical system perspective for Lipschitz
    neural networks*, ICML 2022.
    """

    def __init__(
        self,
        features: int,
        rank: int,
        hidden: int | None = None,
        *,
        tau: float = 0.0,
        activation: Callable[[Tensor], Tensor] | None = None,
        scale: float | str = "free",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        features = check_integer("features", features, low=1)
        if activation is not None:
            check_callable("activation", activation, "a function of a tensor")
        self.layer = LowRankLinear(
            features,
            features if hidden is None else check_integer("hidden", hidden, low=1),
            rank,
            tau=tau,
            scale=scale,
            device=device,
            dtype=dtype,
        )
        self.activation = nn.ReLU() if activation is None else activation

    def forward(self, x: Tensor) -> Tensor:
        """Same shape (..., features) as `x`."""
        U, S, V = self.layer.factors
        Q = S / self.layer.sigma_max()
        linear = nn.functional.linear
        z = linear(x, V.transpose(-2, -1))
        hidden = self.activation(linear(linear(z, Q), U, self.layer.bias))
        back = linear(linear(hidden, U.transpose(-2, -1)), Q.transpose(-2, -1))
        return x - 2.0 * linear(back, V)
