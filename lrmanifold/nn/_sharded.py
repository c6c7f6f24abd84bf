"""Low-rank weights under FSDP2 (``torch.distributed.fsdp.fully_shard``).

It replaces a parameter by a DTensor, each process holding some of its rows, and puts the whole one
in its place for as long as the layer computes. Both come in by the doors of the layer.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import GeometryError
from ..parameter import is_sharded


def takes_sharded(layer: Any, value: Any) -> bool:
    """Whether `value` is a weight of this layer in the hands of FSDP2; it gets the manifold then.

    The rows of a weight that was checked when it came in are not checked again: to see whether they
    are on the manifold they would have to be gathered, and FSDP2 brings them twice a step.

    Raises
    ------
    GeometryError
        If its shape is not that of the weight.
    """
    if is_sharded(value):
        layer.__dict__["_is_sharded"] = True
    elif not (layer.__dict__.get("_is_sharded") and type(value) is nn.Parameter):
        return False
    wanted = (*layer.__dict__["_lead"], *layer.manifold.point_shape)
    if tuple(value.shape) != wanted:
        raise GeometryError(
            f"weight must be a point of {layer.manifold}: its shape must be {wanted}, got "
            f"{tuple(value.shape)}"
        )
    value.manifold = layer.manifold
    layer.__dict__.pop("_own_weight", None)  # FSDP2 frees the whole one
    return True
