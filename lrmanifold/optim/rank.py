"""Changing the rank of a point: augmentation, truncation, and the resizing of all that follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..factors import change_of_base, pack, unpack
from ..manifolds import Factors, FixedRank, WellConditioned
from ..parameter import replace_data
from .coordinates import is_factored
from .geometry import check_vector
from .velocities import tangent_of_velocity, velocity_of_tangent

# State tensors that are tangent vectors at the parameter's point.
_TANGENT_STATE = ("momentum_buffer", "exp_avg")
# Second moments; geoopt's Adam stores them packed, one value repeated over each block.
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def factors_of(p: Tensor) -> Factors:
    """Copies of the factors of a low-rank parameter, in a compute dtype."""
    manifold: FixedRank = p.manifold  # type: ignore[attr-defined]
    wide = p.detach().to(linalg.compute_dtype(p.dtype), copy=True)
    return unpack(wide, manifold.m, manifold.n)


def new_directions(p: Tensor) -> tuple[Tensor, Tensor] | None:
    """What is new in GV and GᵀU: the gradient's blocks U_p and V_p. None if it is not finite."""
    manifold: FixedRank = p.manifold  # type: ignore[attr-defined]
    if p.grad is None or not linalg.all_finite(p.grad):
        return None
    wide = linalg.compute_dtype(p.dtype)
    xi = manifold.egrad2rgrad(p.detach().to(wide), p.grad.to(wide))
    return xi[..., : manifold.m, :], xi[..., -manifold.n :, :]


def augment(X: Factors, dU: Tensor, dV: Tensor, count: int) -> Factors:
    """Add `count` directions to both bases and zeros to the core: the matrix stays the same.

    Parameters
    ----------
    X : Factors
        U (..., m, r), S (..., r, r), V (..., n, r).
    dU, dV : Tensor, shapes (..., m, k), (..., n, k)
        Directions to take up, such as GV and GᵀU; the leading ones by singular value of what is new
        in them.
    count : int
        At most min(m, n) - r and k.

    Returns
    -------
    Factors
        Of rank r + count, the first r columns being those of `X` up to rounding.
    """
    if count == 0:
        return X
    U, R_u = _extended(X.U, dU, count)
    V, R_v = _extended(X.V, dV, count)
    core = torch.nn.functional.pad(R_u @ X.S @ R_v.mT, (0, count, 0, count))
    return Factors(U, core, V)


def _extended(Q: Tensor, D: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Orthonormal [Q, P], P of `count` columns that carry most of D (any, where D has none).

    Q is replaced by the basis Q₁ of Q = Q₁ R, R near I, which is returned too: columns that were
    kept as they are would drift from step to step.
    """
    r = Q.shape[-1]
    P = linalg.svd(D - Q @ (Q.mT @ D)).U
    # Householder on [Q, P]: what P lacks for full rank is completed.
    basis, R = linalg.qr(torch.cat((Q, P), -1), rank_deficient=True)
    return basis[..., : r + count], R[..., :r, :r]


def rank_for_tolerance(s: Tensor, tol: float) -> int:
    """Smallest rank whose truncation error is at most `tol` relative to ‖s‖.

    Parameters
    ----------
    s : Tensor, shape (..., r)
        Singular values, decreasing.
    tol : float
        In [0, 1).

    Returns
    -------
    int
        In 1..r; the largest of the batch.
    """
    energy = s.double().square()
    tail = energy.flip(-1).cumsum(-1).flip(-1)  # tail[i] = energy of i, i+1, ...
    keep = (tail > tol**2 * tail[..., :1]).sum(-1)
    return max(1, int(keep.max()))


def nearest_rank(manifold: FixedRank, s: Tensor, low: int, high: int) -> int:
    """The rank in low..high at which the set of `manifold` comes nearest to a matrix.

    A bound on the condition number lifts every direction that is kept into a band near σ_max, and
    one on the size too into a band that is fixed: to keep one of singular value ε costs about
    σ_max, or the size, to drop it ε. With a bound this is the rank of the projection onto the sets
    of all these ranks together; without one it is `high`.

    Parameters
    ----------
    manifold : FixedRank
    s : Tensor, shape (..., r)
        Singular values, decreasing; r >= high. The elements of a batch share their rank.
    low, high : int
    """
    if not isinstance(manifold, WellConditioned):
        return high
    s = s.double()

    def gap(k: int) -> float:
        kept = s[..., :k]
        moved = manifold.project_spectrum(kept) - kept
        return float(moved.square().sum() + s[..., k:].square().sum())

    return min(range(low, high + 1), key=gap)


def truncate(X: Factors, rank: int) -> Factors:
    """Best approximation of rank `rank` (at most that of `X`), by an SVD of the core."""
    P, s, Qh = linalg.svd(X.S)
    S = torch.diag_embed(s[..., :rank])
    return Factors(X.U @ P[..., :rank], S, X.V @ Qh[..., :rank, :].mT)


def resize(p: Tensor, X: Factors, state: dict[str, Any] | None = None) -> None:
    """Give a low-rank parameter the point `X` of any rank, in place.

    The tensor, the rank of its manifold (which layer and optimizer share) and the optimizer's state
    change together: momentum and first moments are projected onto the new tangent space, which is
    exact when the rank grows. Adam's second moments, mean squares of the blocks' entries, keep
    their meaning for blocks of another width; geoopt's, sums of squares, are scaled with it. The
    gradient is dropped.

    Parameters
    ----------
    p : geoopt.ManifoldParameter on a FixedRank
    X : Factors
        On the set of `p`'s manifold, or (augmented, uncapped) with zeros in the core.
    state : dict, optional
        ``optimizer.state[p]``.
    """
    manifold: FixedRank = p.manifold  # type: ignore[attr-defined]
    wide = linalg.compute_dtype(p.dtype)
    with torch.no_grad():
        before = unpack(p.to(wide), manifold.m, manifold.n)
        state = {} if state is None else state
        for key in _TANGENT_STATE:
            if key in state:
                check_vector(key, state[key], p, f"a weight on {manifold.name}")
        # Ours keeps velocities where the retraction suits; geoopt's optimizers tangent vectors.
        velocities = is_factored(manifold) and {"skipped", "momentum_buffer"} <= state.keys()
        if velocities:
            old = state["momentum_buffer"]
            state["momentum_buffer"] = tangent_of_velocity(manifold, p.detach(), old)
        for key in _TANGENT_STATE:
            if key in state:
                xi = unpack(state[key].to(wide), manifold.m, manifold.n)
                moved = change_of_base(before, xi, X)
                if velocities and key == "momentum_buffer":
                    moved = velocity_of_tangent(X, moved)
                state[key] = pack(*moved).to(p.dtype)
        for key in _SECOND_MOMENTS:
            if key in state and state[key].shape == p.shape:
                pairs = zip(unpack(state[key], manifold.m, manifold.n), X, strict=True)
                sums = [(b[..., :1, :1] * (x.numel() / b.numel())).expand_as(x) for b, x in pairs]
                state[key] = pack(*sums)
        manifold.set_rank_(X.S.shape[-1])
        replace_data(p, pack(*X).to(p.dtype))
