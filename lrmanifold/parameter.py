"""Parameters: whose manifold they are on, replacing their tensor, gathering one that is sharded."""

from __future__ import annotations

import gc
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
    That also drops the hooks of DistributedDataParallel, so a shape that stays keeps its leaf.

    Raises
    ------
    RuntimeError
        If the shape changes under DistributedDataParallel, which sends gradients of the old one.
    """
    if p.shape == X.shape and p.dtype == X.dtype:
        p.grad = None
        p.data = X
        return
    if is_wrapped_in_ddp(p):
        raise RuntimeError(
            f"a weight of shape {tuple(p.shape)} cannot become {tuple(X.shape)} within "
            "DistributedDataParallel, which sends gradients of the old shape: change ranks on the "
            "bare model and wrap it again afterwards (DLRT: integrator='bug' or 'ksl' keep ranks)"
        )
    p.grad = None
    other = torch.float32 if p.dtype == torch.float64 else torch.float64
    p.data = torch.empty(0, dtype=other, device=p.device)
    p.data = X


def is_wrapped_in_ddp(p: Tensor) -> bool:
    """Whether some DistributedDataParallel looks after the gradient of `p`.

    torch does not tell; all objects are looked through, where there is a process group at all.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    kind = torch.nn.parallel.DistributedDataParallel
    wrappers = [x for x in gc.get_objects() if type(x) is kind]
    return any(q is p for wrapper in wrappers for q in wrapper.parameters())


def is_sharded(x: Any) -> bool:
    """Whether a tensor is a DTensor; without the cost of importing those where there are none."""
    return getattr(x, "placements", None) is not None and hasattr(x, "full_tensor")


def gathered(X: Tensor) -> Tensor:
    """The whole tensor; of a DTensor, all its processes take part."""
    return X.full_tensor() if is_sharded(X) else X  # type: ignore[attr-defined]


def local_part(X: Any) -> Tensor:
    """What this process holds of a sharded tensor, without gradients."""
    return X.to_local().detach()


def rows_of(p: Any, full: Tensor) -> Tensor:
    """What this process holds of a tensor sharded like `p`, from the whole one; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    whole = [Replicate()] * p.device_mesh.ndim
    replicated = DTensor.from_local(full, p.device_mesh, whole, run_check=False)
    return replicated.redistribute(placements=p.placements).to_local()


def sharded_from_local(p: Any, local: Tensor) -> Tensor:
    """A tensor sharded like `p` of which this process holds `local`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local.clone(),
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


def sharded_like(p: Any, full: Tensor) -> Tensor:
    """A tensor sharded like `p` from the whole one, which every process has; nothing is sent."""
    return sharded_from_local(p, rows_of(p, full))
