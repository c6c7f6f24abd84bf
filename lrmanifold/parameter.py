"""Parameters: whose manifold they are on, replacing their tensor, gathering one that is sharded."""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from torch import Tensor

from .errors import GeometryError


class PointParameter(geoopt.ManifoldParameter):
    """geoopt's ManifoldParameter, whose memory nobody replaces without looking at the geometry.

    ``torch.nn.utils.parametrize`` overwrites a weight by ``set_`` before it takes it from its
    layer, so that the layer's refusal would come too late.
    """

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused."""
        raise GeometryError(
            "the weight of a low-rank layer cannot be parametrized or given other memory by set_: "
            "its factors would leave the manifold; densify the layer first"
        )


def manifold_of(p: Any) -> geoopt.Manifold | None:
    """The manifold that a parameter lives on; None for an ordinary one."""
    manifold = getattr(p, "manifold", None)
    # geoopt's default for a ManifoldParameter without geometry: an ordinary parameter.
    return None if isinstance(manifold, geoopt.Euclidean) else manifold


def replace_data(p: Tensor, X: Tensor) -> None:
    """Give a parameter another tensor of its dtype, of any shape, and drop its gradient.

    Autograd remembers the shape of a leaf for as long as some graph over it is alive (a loss that
    the caller keeps, say), and forgets it only when the dtype changes: pass through another one.
    """
    p.grad = None
    other = torch.float32 if p.dtype == torch.float64 else torch.float64
    p.data = torch.empty(0, dtype=other, device=p.device)
    p.data = X


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor; without the cost of importing those where there are none."""
    return getattr(x, "placements", None) is not None and hasattr(x, "full_tensor")


def gathered(X: Tensor) -> Tensor:
    """The whole tensor; of a DTensor, all its processes take part."""
    return X.full_tensor() if is_sharded(X) else X  # type: ignore[attr-defined]
