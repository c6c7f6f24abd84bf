"""Low-rank convolutions: r filters of the full size, then a 1 x 1 convolution."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import check_choice, check_flag, check_integer
from ..manifolds.fixed_rank import Gradient
from .kernels import KernelLayer, sizes
from .layer import make_manifold

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _LowRankConvNd(KernelLayer):
    """Shared by the three dimensions; see :class:`LowRankConv2d`."""

    _options = ("stride", "padding", "dilation", "groups", "bias", "padding_mode")
    _convolve: ClassVar[Any]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
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
        kernel_size = sizes("kernel_size", kernel_size, dims, 1)
        stride = sizes("stride", stride, dims, 1)
        dilation = sizes("dilation", dilation, dims, 1)
        if not isinstance(padding, str):
            padding = sizes("padding", padding, dims, 0)
        check_choice("padding_mode", padding_mode, _PADDING_MODES)
        # torch's own layer, without storage, validates the rest and works out the padding.
        dense: Any = self._dense_class(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device="meta",
        )
        m = out_channels // groups
        n = math.prod(dense.kernel_size) * in_channels // groups
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        lead = (groups,) if groups > 1 else ()
        manifold = make_manifold(
            m, n, rank, tau=tau, gradient=gradient, retraction=retraction, scale=scale
        )
        super().__init__(manifold, lead, **factory)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = dense.kernel_size, dense.stride
        self.padding, self.dilation = dense.padding, dense.dilation
        self.padding_mode = padding_mode
        self._pad = tuple(dense._reversed_padding_repeated_twice)
        self._register_bias(out_channels if bias else None, **factory)
        self.reset_parameters()

    def _first(self, x: Tensor, V: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pad, mode=self.padding_mode), 0
        filters = self._filters(V)
        if x.ndim != 4 or x.is_contiguous():
            # The layout of the filters would become that of the output. A copy has the strides of
            # its shape, which .contiguous() leaves as they are for kernels of size 1.
            filters = filters.clone(memory_format=torch.contiguous_format)
        convolve = type(self)._convolve
        return convolve(x, filters, None, self.stride, padding, self.dilation, self.groups)

    def _filters(self, V: Tensor) -> Tensor:
        """The columns of V as filters, shape (groups * r, in_channels / groups, *kernel_size)."""
        # One plain transpose: this is why the channels are last in V.
        rows = V.transpose(-2, -1).contiguous()
        rows = rows.reshape(-1, *self.kernel_size, self.in_channels // self.groups)
        return rows.movedim(-1, 1)

    def _last(self, z: Tensor, U: Tensor, S: Tensor | None, bias: Tensor | None) -> Tensor:
        ones = (1,) * len(self.kernel_size)
        mix = (U if S is None else U @ S).reshape(self.out_channels, -1, *ones)
        return type(self)._convolve(z, mix, bias, 1, 0, 1, self.groups)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """(out_channels, in_channels / groups, *kernel_size)."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def matricised(self, weight: Tensor) -> Tensor:
        """A dense kernel as the matrix that the manifold holds, shape ([groups,] m, n).

        Parameters
        ----------
        weight : Tensor, shape (out_channels, in_channels / groups, *kernel_size)

        Returns
        -------
        Tensor
            The columns go through the kernel's positions first and the channels last.
        """
        M = self.manifold
        return weight.movedim(1, -1).reshape(*self.weight.shape[:-2], M.m, M.n)

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matricised`."""
        kernel = matrix.reshape(self.out_channels, *self.kernel_size, -1)
        return kernel.movedim(-1, 1).contiguous()


class LowRankConv1d(_LowRankConvNd):
    """Low-rank ``nn.Conv1d``; see :class:`LowRankConv2d`."""

    _dense_class = nn.Conv1d
    _convolve = staticmethod(F.conv1d)


class LowRankConv2d(_LowRankConvNd):
    """Drop-in for ``nn.Conv2d`` whose matricised kernel is well-conditioned of rank r.

    The kernel, as a matrix (out_channels) x (prod(kernel_size) · in_channels), is U S Vᵀ. Its
    columns are those of ``weight.flatten(1)`` of the dense layer in another order, channels last,
    which is that of the filters in ``torch.channels_last``; see ``matricised``. The layer runs as a
    convolution with the r filters Vᵀ followed by a 1 x 1 convolution with U S; no im2col.
    With groups, every group has a matrix of its own: the weight has the groups as a batch dimension
    (groups, m + r + n, r), m = out_channels/groups, n = prod(kernel_size) · in_channels/groups.

    The condition number bounded here is that of the matricised kernel. It is *not* that of the
    convolution as an operator on images (mathematics 6); ``linalg.convolution_norm`` bounds that.

    Parameters
    ----------
    in_channels, out_channels, kernel_size
        As in torch.
    rank : int
        In 1..min(m, n) of the matrix above.
    stride, padding, dilation, groups, bias, padding_mode
        As in torch, ``padding="same"`` and all padding modes included.
    tau : float or None
        The condition number of the matrix stays at most 1 + tau; None for no bound.
    gradient, retraction, scale
        As in :class:`LowRankLinear`.
    device, dtype
        As in torch.
    """

    _dense_class = nn.Conv2d
    _convolve = staticmethod(F.conv2d)


class LowRankConv3d(_LowRankConvNd):
    """Low-rank ``nn.Conv3d``; see :class:`LowRankConv2d`."""

    _dense_class = nn.Conv3d
    _convolve = staticmethod(F.conv3d)
