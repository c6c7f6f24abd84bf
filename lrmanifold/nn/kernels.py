"""What low-rank convolutions and transposed ones share: sizes, and the way from and to torch's."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from .._arguments import check_choice, check_integer
from ._obstacles import check_dense
from .layer import INITS, LowRankLayer

_USUAL: dict[str, Any] = {"groups": 1, "bias": True, "padding_mode": "zeros"}
_USUAL_SIZES = {"padding": 0, "output_padding": 0, "dilation": 1}


def sizes(name: str, value: Any, dims: int, low: int) -> tuple[int, ...]:
    """One integer for all dimensions, or one for each."""
    if not isinstance(value, (tuple, list)):
        return (check_integer(name, value, low=low),) * dims
    if len(value) != dims:
        raise ValueError(f"{name} must be an integer or {dims} integers, got {value!r}")
    return tuple(check_integer(f"{name}[{i}]", v, low=low) for i, v in enumerate(value))


class KernelLayer(LowRankLayer):
    """A layer with a kernel of torch's, whose constructor takes `rank` behind the kernel's size.

    Attributes
    ----------
    in_channels, out_channels : int
    kernel_size : tuple of int
    """

    _dense_class: ClassVar[type[nn.Module]]
    #: torch's arguments behind the kernel's size, in torch's order.
    _options: ClassVar[tuple[str, ...]]
    in_channels: int
    out_channels: int
    kernel_size: Any

    @classmethod
    def from_dense(cls, module: nn.Module, rank: int, *, init: str = "svd", **geometry: Any):
        """The low-rank layer of a dense one, by the SVD of its matricised kernel.

        Parameters
        ----------
        module : nn.Module
            Of torch's class for this layer and its dimension.
        rank : int
            In 1..min(m, n) of the matrix.
        init : {"svd", "random"}
        **geometry
            As in :meth:`LowRankLinear.from_dense`.
        """
        check_dense("module", module, cls._dense_class)
        check_choice("init", init, INITS)
        dense: Any = module
        make: Any = cls
        layer = make(
            dense.in_channels,
            dense.out_channels,
            dense.kernel_size,
            rank,
            *_options_of(dense, cls._options),
            **geometry,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        layer._take_over(dense, init)
        return layer

    def to_dense(self) -> nn.Module:
        """torch's layer with the same function."""
        dense = self._dense_class(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            *_options_of(self, self._options),
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        self._hand_over(dense)
        return dense

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"kernel_size={self.kernel_size}"]
        dims = len(self.kernel_size)
        for name, value in zip(self._options, _options_of(self, self._options), strict=True):
            usual = (_USUAL_SIZES[name],) * dims if name in _USUAL_SIZES else _USUAL.get(name)
            if value != usual:
                parts.append(f"{name}={value!r}")
        return ", ".join([*parts, self._geometry_repr()])


def _options_of(layer: Any, names: tuple[str, ...]) -> list[Any]:
    """Arguments that make such a layer: attributes, but for the bias, which is there or not."""
    return [getattr(layer, n) if n != "bias" else layer.bias is not None for n in names]
