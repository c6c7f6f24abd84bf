"""Two ordinary layers that hold one matrix as a product of free factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import linalg
from .kinds import kind_of


class TwoFactors(nn.Sequential):
    """A thin layer without bias, then one with it: W = A Bᵀ, A (m x r), Bᵀ (r x n)."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (m, r) and Bᵀ (r, n)."""
        layers: list[Any] = list(self)
        Bt, A = (layer.weight.detach().flatten(1) for layer in layers)
        return A, Bt

    def svdvals(self) -> Tensor:
        """The r singular values of A Bᵀ in decreasing order, in float64, without forming it."""
        A, Bt = (factor.double() for factor in self.factors())
        _, R_a = linalg.qr(A, rank_deficient=True)
        _, R_b = linalg.qr(Bt.mT, rank_deficient=True)
        return linalg.svdvals(R_a @ R_b.mT)


def is_pair(module: nn.Module) -> bool:
    """Whether it is a :class:`TwoFactors` whose layers are dense still, with plain weights."""
    return (
        isinstance(module, TwoFactors)
        and len(module) == 2
        and all(kind_of(part) and part._parameters.get("weight") is not None for part in module)
    )
