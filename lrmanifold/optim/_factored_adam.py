"""The step of Riemannian Adam by thin products alone, with what one part finds used by the others.

The same step as :func:`lrmanifold.optim.adam_update` makes with the retraction "factored", on one
weight on the CPU. With P the block U_p of the first moment, N = lr s S⁻¹ (s the scale of the block)
and the polar factor U₊ = Y K of Y = U - P N, K = (YᵀY)^(-1/2), transport needs the overlaps

    U₊ᵀU = K,   U₊ᵀP = K (YᵀP) =: c,   U = U₊K⁻¹ + P N,

so that the new block is (I - U₊U₊ᵀ)(U inner + P b) = P B - U₊ c B with B = N inner + b: two
products a side instead of five. With the gauge identity for UᵀG_U and the inverse that gradient and
retraction share, a step costs 16 (m + n) r² flops instead of 22.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import linalg
from ..factors import unpack
from ..manifolds import Factors, FixedRank
from ._factored import _NEAR, Side, Step, Workspace, gauge_holds, project_core
from ._moments import means_of_blocks


class AdamStep(NamedTuple):
    """A step that is computed but not written."""

    step: Step
    first: Tensor  # packed, at the new point; from the workspace, under "transported"
    second: Tensor


def factored_adam_step(
    manifold: FixedRank,
    X: Factors,
    G: Factors,
    first: Tensor | None,
    second: Tensor | None,
    step: float,
    options: dict[str, Any],
    workspace: Workspace,
    cores: linalg.ClipMemory,
) -> AdamStep | None:
    """Compute one step; nothing is written. None where it is too long for this path.

    Parameters
    ----------
    manifold : FixedRank
        With the retraction "factored".
    X, G : Factors
        Point and Euclidean gradient, (m, r), (r, r), (n, r), on the CPU in a compute dtype.
    first, second, step
        As in :func:`lrmanifold.optim.adam_update`.
    options : dict
        Its keyword arguments.
    workspace, cores
        Of the optimizer, and of this weight.
    """
    lr, (beta, beta2) = float(options["lr"]), options["betas"]
    inverse = linalg.inverse(X.S)
    packed = {
        name: workspace.take(name, manifold.point_shape, X.S)
        for name in ("gradient", "first", "point", "transported")
    }
    xi, new, goal, moved = (unpack(x, manifold.m, manifold.n) for x in packed.values())
    _gradient(manifold, X, G, inverse, xi)
    if first is None:
        torch.mul(packed["gradient"], 1 - beta, out=packed["first"])
    else:
        torch.lerp(first, packed["gradient"], 1 - beta, out=packed["first"])

    second = (1 - beta2) * means_of_blocks(manifold, _square_sums(xi)) + (
        0.0 if second is None else beta2 * second
    )
    root = (second / (1 - beta2**step)).sqrt() + options["eps"]
    scale = 1.0 / (root * (1 - beta**step)).clamp_min(torch.finfo(root.dtype).tiny)
    # Multiplied before it is squared: the scale of a block that is zero is nearly infinite.
    size = means_of_blocks(manifold, (_square_sums(new).sqrt() * scale).square())
    s_U, s_M, s_V = (scale * size.clamp_min(1.0).rsqrt()).tolist()

    force = s_M * new.S
    if options["weight_decay"]:
        force = force + options["weight_decay"] * X.S
    if options["penalty"]:
        squared = options["penalty_squared"]
        slope = linalg.conditioning_penalty_grad(X.S, squared=squared)
        force = force + options["penalty"] * slope
    S = project_core(manifold, X.S - lr * force, 0.0, cores)

    sides = []
    for Q, P, N, Y in (
        (X.U, new.U, lr * s_U * inverse, goal.U),
        (X.V, new.V, lr * s_V * inverse.mT, goal.V),
    ):
        side = _moved(Q, P, N, Y)
        if side is None:
            return None
        sides.append(side)
    (U, c_U, N_U), (V, c_V, N_V) = sides
    K_U, K_V = (_root(side, S) for side in (U, V))
    right, left = new.S @ K_V + c_V.mT, K_U @ new.S + c_U
    torch.add(K_U @ right, c_U @ K_V, out=moved.S)
    _transport(new.U, U, c_U, N_U @ right + K_V, moved.U)
    _transport(new.V, V, c_V, N_V @ left.mT + K_U, moved.V)
    return AdamStep(Step(U, S, V, None), packed["transported"], second)


def _gradient(manifold: FixedRank, X: Factors, G: Factors, inverse: Tensor, out: Factors) -> None:
    """The Riemannian gradient (U_p, M, V_p)."""
    probe, known = manifold.gradient == "probe", gauge_holds(manifold, X, G)
    for Q, g, A, within, block in (
        (X.U, G.U, inverse.mT, G.S, out.U),
        (X.V, G.V, inverse, G.S.mT, out.V),
    ):
        if Q.shape[0] == Q.shape[1]:
            block.zero_()  # nothing is orthogonal to a full basis
            continue
        # The part within the old basis is M, unless the gradient was edited.
        if probe:
            torch.addmm(g, Q, within if known else Q.mT @ g, alpha=-1.0, out=block)
        else:
            torch.mm(g, A, out=block)
            block.addmm_(Q, within if known else Q.mT @ block, alpha=-1.0)
    out.S.copy_(G.S)


def _square_sums(blocks: Factors) -> Tensor:
    flat = [b.reshape(-1) for b in blocks]
    return torch.stack([torch.dot(b, b) for b in flat])


def _moved(Q: Tensor, P: Tensor, N: Tensor, Y: Tensor) -> tuple[Side, Tensor, Tensor] | None:
    """The polar factor of Q - P N, its overlap with P, and N; None if that is a long way."""
    if Q.shape[0] == Q.shape[1]:
        none = torch.zeros_like(N)
        return Side(Y.copy_(Q), None, none), none, none
    torch.addmm(Q, P, N, alpha=-1.0, out=Y)
    E = linalg.gram(Y)
    E.diagonal().sub_(1.0)
    size = float(torch.linalg.vector_norm(E))
    if not size <= _NEAR:
        return None
    K = linalg.inverse_square_root(E, size)
    return Side(Y, K, E), K @ (Y.mT @ P), N


def _root(side: Side, like: Tensor) -> Tensor:
    if side.K is not None:
        return side.K
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _transport(P: Tensor, side: Side, c: Tensor, B: Tensor, out: Tensor) -> None:
    """out = (I - U₊U₊ᵀ) P B."""
    if side.K is None:
        out.zero_()
        return
    torch.mm(P, B, out=out)
    out.addmm_(side.Y, side.K @ (c @ B), alpha=-1.0)
