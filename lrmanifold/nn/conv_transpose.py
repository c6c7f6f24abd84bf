"""Low-rank transposed convolutions: a 1 x 1 convolution to r channels, then r filters."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import check_flag, check_integer
from ..manifolds.fixed_rank import Gradient
from .kernels import KernelLayer, sizes
from .layer import make_manifold


class _LowRankConvTransposeNd(KernelLayer):
    """Shared by the three dimensions; see :class:`LowRankConvTranspose2d`."""

    _options = (
        "stride",
        "padding",
        "output_padding",
        "groups",
        "bias",
        "dilation",
        "padding_mode",
    )
    _mix: ClassVar[Any]
    _spread: ClassVar[Any]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        *,
        tau: float | None = 0.1,
        gradient: Gradient = "factors",
        retraction: str | None = None,
        scale: float | str = "free",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_channels = check_integer("in_channels", in_channels, low=1)
        out_channels = check_integer("out_channels", out_channels, low=1)
        groups = check_integer("groups", groups, low=1)
        bias = check_flag("bias", bias)
        dims = int(self._dense_class.__name__[-2])
        # torch's own layer, without storage, validates the rest.
        dense: Any = self._dense_class(
            in_channels,
            out_channels,
            sizes("kernel_size", kernel_size, dims, 1),
            sizes("stride", stride, dims, 1),
            sizes("padding", padding, dims, 0),
            sizes("output_padding", output_padding, dims, 0),
            groups,
            bias,
            sizes("dilation", dilation, dims, 1),
            padding_mode,
            device="meta",
        )
        m = math.prod(dense.kernel_size) * out_channels // groups
        n = in_channels // groups
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        manifold = make_manifold(
            m, n, rank, tau=tau, gradient=gradient, retraction=retraction, scale=scale
        )
        super().__init__(manifold, (groups,) if groups > 1 else (), **factory)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = dense.kernel_size, dense.stride
        self.padding, self.output_padding = dense.padding, dense.output_padding
        self.dilation, self.padding_mode = dense.dilation, padding_mode
        self._register_bias(out_channels if bias else None, **factory)
        self.reset_parameters()

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """As torch's: of the sizes that a stride leaves open, `output_size` chooses one."""
        if output_size is None:
            return super().forward(x)
        own = self.output_padding
        self.output_padding = self._padding_for(x, list(output_size))
        try:
            return super().forward(x)
        finally:
            self.output_padding = own

    def _padding_for(self, x: Tensor, size: list[int]) -> tuple[int, ...]:
        dims = len(self.kernel_size)
        wanted = size[-dims:]
        smallest = [
            (n - 1) * s - 2 * p + d * (k - 1) + 1
            for n, s, p, d, k in zip(
                x.shape[-dims:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel_size,
                strict=True,
            )
        ]
        extra = tuple(w - low for w, low in zip(wanted, smallest, strict=len(wanted) == dims))
        if len(size) not in (dims, x.ndim) or not all(
            0 <= e < s for e, s in zip(extra, self.stride, strict=False)
        ):
            largest = [low + s - 1 for low, s in zip(smallest, self.stride, strict=True)]
            raise ValueError(
                f"output_size must have {dims} numbers between {smallest} and {largest}, got {size}"
            )
        return extra

    def _first(self, x: Tensor, V: Tensor) -> Tensor:
        ones = (1,) * len(self.kernel_size)
        mix = V.transpose(-2, -1).reshape(-1, self.in_channels // self.groups, *ones)
        return type(self)._mix(x, mix, None, 1, 0, 1, self.groups)

    def _last(self, z: Tensor, U: Tensor, S: Tensor | None, bias: Tensor | None) -> Tensor:
        filters = self._filters(U if S is None else U @ S)
        return type(self)._spread(
            z,
            filters,
            bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )

    def _filters(self, U: Tensor) -> Tensor:
        """The columns of U as filters, shape (groups * r, out_channels / groups, *kernel_size)."""
        return U.transpose(-2, -1).reshape(-1, self.out_channels // self.groups, *self.kernel_size)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """(in_channels, out_channels / groups, *kernel_size)."""
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    def matricised(self, weight: Tensor) -> Tensor:
        """A dense kernel as the matrix that the manifold holds, shape ([groups,] m, n).

        Parameters
        ----------
        weight : Tensor, shape (in_channels, out_channels / groups, *kernel_size)
        """
        M = self.manifold
        return weight.reshape(*self.weight.shape[:-2], M.n, M.m).mT

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matricised`."""
        return matrix.mT.reshape(self.dense_shape)

    def _is_dense(self, value: Tensor) -> bool:
        return tuple(value.shape) == self.dense_shape


class LowRankConvTranspose1d(_LowRankConvTransposeNd):
    """Low-rank ``nn.ConvTranspose1d``; see :class:`LowRankConvTranspose2d`."""

    _dense_class = nn.ConvTranspose1d
    _mix = staticmethod(F.conv1d)
    _spread = staticmethod(F.conv_transpose1d)


class LowRankConvTranspose2d(_LowRankConvTransposeNd):
    """Drop-in for ``nn.ConvTranspose2d`` whose matricised kernel is well-conditioned of rank r.

    The kernel as a matrix, (out_channels · prod(kernel_size)) x in_channels, is U S Vᵀ: it takes
    the channels of one pixel to the patch that the pixel is spread over. The layer runs as a 1 x 1
    convolution to r channels, Vᵀ, on the small grid, followed by a transposed convolution with the
    r filters U S. With groups, every group has a matrix of its own, as in :class:`LowRankConv2d`.

    The condition number bounded here is that of the matricised kernel, not that of the map on
    images.

    Parameters
    ----------
    in_channels, out_channels, kernel_size
        As in torch.
    rank : int
        In 1..min(m, n) of the matrix above.
    stride, padding, output_padding, groups, bias, dilation, padding_mode
        As in torch; the only padding mode there is "zeros".
    tau : float or None
        The condition number of the matrix stays at most 1 + tau; None for no bound.
    gradient, retraction, scale
        As in :class:`LowRankLinear`.
    device, dtype
        As in torch.
    """

    _dense_class = nn.ConvTranspose2d
    _mix = staticmethod(F.conv2d)
    _spread = staticmethod(F.conv_transpose2d)


class LowRankConvTranspose3d(_LowRankConvTransposeNd):
    """Low-rank ``nn.ConvTranspose3d``; see :class:`LowRankConvTranspose2d`."""

    _dense_class = nn.ConvTranspose3d
    _mix = staticmethod(F.conv3d)
    _spread = staticmethod(F.conv_transpose3d)
