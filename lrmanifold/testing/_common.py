"""Points and vectors of any manifold, and what they are compared by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from .. import linalg
from .._arguments import check_device, check_dtype, check_instance, check_integer
from ..manifolds import WellConditioned


class CheckError(AssertionError):
    """A manifold or a retraction does not do what it promises; the message says what."""


def plain(x: Tensor) -> Tensor:
    """The bare tensor of a point, without geoopt's subclass."""
    return x.detach().as_subclass(torch.Tensor)


def random_tangent(
    manifold: geoopt.Manifold, x: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """A Gaussian tangent vector at `x`: ``proju(x, N(0, 1))``, shape, dtype and device of `x`.

    For an orthogonal `proju` its distribution is isotropic in the tangent space, E‖u‖² = dim.
    """
    x = plain(x)
    noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return manifold.proju(x, noise)


def dense(manifold: geoopt.Manifold, x: Tensor) -> Tensor:
    """The matrix that a packed point stands for; the point itself for other manifolds."""
    return manifold.to_dense(x) if hasattr(manifold, "to_dense") else x


def dense_vector(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    """The matrix that a packed tangent vector stands for; the vector itself for other manifolds."""
    return manifold.tangent_to_dense(x, u) if hasattr(manifold, "tangent_to_dense") else u


def euclidean_gradient(
    manifold: geoopt.Manifold, f: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """What ``manifold.egrad2rgrad`` expects for the function ``f(dense(x))``.

    The gradient in the packed tensor; for a :class:`~lrmanifold.FixedRank` with
    ``gradient="probe"`` the products (GV, UᵀGV, GᵀU) of the dense gradient G.
    """
    with torch.enable_grad():
        if getattr(manifold, "gradient", None) == "probe":
            W = dense(manifold, x).requires_grad_()
            (G,) = torch.autograd.grad(f(W), W)
            U, _, V = manifold.unpack(x)
            return manifold.pack(G @ V, U.mT @ G @ V, G.mT @ U)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(dense(manifold, leaf)), leaf)[0]


def check_options(manifold: Any, dtype: Any, device: Any, seed: Any, trials: Any) -> None:
    """Raise for options of a wrong type or out of range."""
    check_instance("manifold", manifold, geoopt.Manifold, "a geoopt.Manifold")
    if dtype is None or device is None:
        raise TypeError(f"dtype and device must be given, got dtype={dtype}, device={device}")
    # The probes are roundoff in half precision, so that what is right would fail.
    check_dtype("dtype", dtype, (torch.float64, torch.float32))
    check_device("device", device)
    check_integer("seed", seed, low=-(2**63), high=2**64 - 1)
    check_integer("trials", trials, low=1)


def point_size(manifold: geoopt.Manifold, size: Sequence[int] | None) -> tuple[int, ...]:
    """Shape of one point: as given, or the manifold's own, or (7, 3) or (7,) by its `ndim`."""
    if size is not None:
        wanted = "the shape of one point, such as (7, 3)"
        return tuple(check_instance("size", size, (tuple, list), wanted))
    return tuple(getattr(manifold, "point_shape", (7, 3)[: manifold.ndim or 0]))


def _inside(manifold: WellConditioned, S: Tensor) -> Tensor:
    """The core drawn to the middle of its bounds, to half the ratio that τ allows."""
    if manifold.scale == "free":
        return linalg.spectral_clip(S, 0.5 * manifold.tau)
    U, s, Vh = linalg.svd(S)
    high = manifold.scale
    low = high / (1.0 + manifold.tau)
    return (U * s.clamp(low + 0.25 * (high - low), high - 0.25 * (high - low))) @ Vh


def where_smooth(manifold: geoopt.Manifold, x: Tensor, xi: Tensor) -> tuple[Tensor, Tensor]:
    """A point near `x` and a direction near `xi` at which the retraction is smooth.

    On :class:`~lrmanifold.WellConditioned` a retraction never leaves the set, so that it follows ξ
    only inside. The core is drawn inside. Of M = S A the skew part, and the multiple of I where the
    size is free, move the bounded ratios to second order only; the rest moves them to first. With a
    direction of length √τ and the rest of length τ, for τ < 1, both stay within the room there is,
    about τ. Without room (τ = 0) the first ones alone are tangent to the set, at length 1. All in
    units of σ_r, the distance to lower rank, or of 1 where there is no rank.
    """
    length = 1.0
    if isinstance(manifold, WellConditioned):
        X, (U_p, M, V_p) = manifold.unpack(x), manifold.unpack(xi)
        S = _inside(manifold, X.S)
        x = manifold.pack(X.U, S, X.V)
        A = torch.linalg.solve(S, M)
        free = 0.5 * (A - A.mT)
        if manifold.scale == "free":
            free = free + A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype, device=A.device)
        # A room of little more than roundoff is none: nothing could be measured in it.
        some = manifold.tau > torch.finfo(x.dtype).eps ** 0.75
        room = min(1.0, manifold.tau) if some else 0.0
        xi = manifold.pack(U_p, S @ (free + room**0.5 * (A - free)), V_p)
        length = room**0.5 if room else 1.0
    if hasattr(manifold, "svdvals"):
        length *= float(manifold.svdvals(x)[..., -1])
    return x, xi * (length / manifold.norm(x, xi).clamp_min(torch.finfo(x.dtype).tiny))
