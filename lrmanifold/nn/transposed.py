"""Low-rank form of transformers' ``Conv1D``, a linear layer that keeps its weight transposed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import check_choice
from ._obstacles import check_dense
from .layer import INITS
from .linear import LowRankLinear


def conv1d_of_transformers(modules: Mapping[str, Any]) -> Any:
    """The class ``Conv1D``, if `modules` (``sys.modules``, say) hold transformers; else None."""
    return getattr(modules.get("transformers.pytorch_utils"), "Conv1D", None)


class LowRankTransposedLinear(LowRankLinear):
    """Drop-in for ``transformers.pytorch_utils.Conv1D``: GPT-2's linear layer.

    It computes what :class:`LowRankLinear` computes. Only the dense layer that it stands for is
    another one: its weight has shape (inputs, outputs), the transpose of torch's. transformers is
    not imported before :meth:`to_dense` needs it.

    Parameters
    ----------
    nf, nx : int
        Outputs and inputs, in the order of ``Conv1D``.
    rank : int
        In 1..min(nf, nx).
    **options
        `tau`, `gradient`, `retraction`, `scale`, `device` and `dtype` of :class:`LowRankLinear`.
    """

    def __init__(self, nf: int, nx: int, rank: int, **options: Any) -> None:
        super().__init__(nx, nf, rank, **options)
        self.nf, self.nx = self.out_features, self.in_features

    @classmethod
    def from_dense(
        cls, module: Any, rank: int, *, init: str = "svd", **geometry: Any
    ) -> LowRankTransposedLinear:
        """A low-rank layer from a ``Conv1D``; arguments as in :meth:`LowRankLinear.from_dense`."""
        check_dense("module", module, _conv1d())
        check_choice("init", init, INITS)
        nx, nf = module.weight.shape
        factory = {"device": module.weight.device, "dtype": module.weight.dtype}
        layer = cls(nf, nx, rank, **geometry, **factory)
        layer._take_over(module, init)
        return layer

    def to_dense(self) -> nn.Module:  # type: ignore[override]
        """The ``Conv1D`` with the same function.

        Raises
        ------
        ImportError
            Without transformers.
        """
        weight, bias = self.weight, self.bias
        assert bias is not None
        dense = _conv1d()(self.nf, 0)
        dense.nx = self.nx
        dense.weight = nn.Parameter(weight.new_empty(self.nx, self.nf).as_subclass(Tensor))
        dense.bias = nn.Parameter(torch.empty_like(bias))
        self._hand_over(dense)
        return dense

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """(nx, nf)."""
        return self.nx, self.nf

    def matricised(self, weight: Tensor) -> Tensor:
        """The transpose of `weight`."""
        return weight.mT

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The transpose of `matrix`."""
        return matrix.mT

    def _is_dense(self, value: Tensor) -> bool:
        return tuple(value.shape) == self.dense_shape


def _conv1d() -> Any:
    kind = conv1d_of_transformers(sys.modules)
    if kind is None:
        try:
            kind = importlib.import_module("transformers.pytorch_utils").Conv1D
        except ImportError as error:
            raise ImportError(
                "the dense form of a LowRankTransposedLinear is transformers' Conv1D: "
                "pip install transformers"
            ) from error
    return kind
