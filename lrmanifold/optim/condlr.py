"""CondLR: stochastic gradient descent on the manifold of well-conditioned low-rank matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from .. import linalg
from ..factors import unpack
from ..manifolds import Factors, FixedRank
from ..parameter import gathered, is_sharded, manifold_of
from ..precision import storage_tolerance
from ._base import GeometricOptimizer, Item, Ok, and_finite, commit, store
from ._distributed import sharded_like
from ._factored import (
    MOMENTUM_STATE,
    Metric,
    Momentum,
    Options,
    factored_step,
    factored_transport,
    is_factored,
    tangent_momentum,
)
from ._together import bundle_key, step_together

# Options that have no meaning for other retractions.
_FACTORED_ONLY = ("clip_margin", "orthonormality_tol")


def add_to_core(manifold: FixedRank, xi: Tensor, term: Tensor) -> Tensor:
    """Add a matrix to the block M of a packed tangent vector."""
    U_p, M, V_p = manifold.unpack(xi)
    return manifold.pack(U_p, M + term, V_p)


def _scaled(manifold: FixedRank, X: Tensor, xi: Tensor) -> Tensor:
    """The Riemannian gradient in the scalar metric: U_p SᵀS r/‖S‖² and V_p SSᵀ r/‖S‖²."""
    S, (U_p, M, V_p) = manifold.unpack(X).S, manifold.unpack(xi)
    c = manifold.rank / S.square().sum((-2, -1), keepdim=True)
    return manifold.pack(U_p @ (c * S.mT @ S), M, V_p @ (c * S @ S.mT))


def condlr_update(
    manifold: geoopt.Manifold,
    X: Tensor,
    G: Tensor,
    buffer: Tensor | None,
    *,
    lr: float | Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    penalty: float,
    penalty_squared: bool = False,
    metric: Metric = "exact",
) -> tuple[Tensor, Tensor | None]:
    """One CondLR step as a pure function.

    ξ = P_W G + wd·S (on the block M); b ← momentum·b + ξ; the point moves along -lr (b + β∇R(S))
    (Nesterov: ξ + momentum·b for b) by the manifold's retraction, and b is transported with it.
    Decay and penalty depend on the singular values alone, so their Riemannian gradients have only
    the block M. The penalty does not enter the momentum: it is a force of the present core.

    Parameters
    ----------
    manifold : geoopt.Manifold
    X : Tensor
        Point; for low-rank weights packed, (..., m + r + n, r).
    G : Tensor
        Euclidean gradient with respect to `X`, as autograd returns it.
    buffer : Tensor or None
        Momentum, a tangent vector at `X`; None before the first step.

    Returns
    -------
    Y, buffer : Tensor, Tensor or None
        New point, and the momentum as a tangent vector there (None without momentum).
    """
    low_rank = isinstance(manifold, FixedRank)
    xi = manifold.egrad2rgrad(X, G)
    if low_rank and metric == "scalar":
        xi = _scaled(manifold, X, xi)
    if low_rank and weight_decay:
        xi = add_to_core(manifold, xi, weight_decay * manifold.unpack(X).S)
    direction = xi
    if momentum:
        buffer = xi if buffer is None else momentum * buffer + xi
        direction = xi + momentum * buffer if nesterov else buffer
    if low_rank and penalty:
        force = linalg.conditioning_penalty_grad(manifold.unpack(X).S, squared=penalty_squared)
        direction = add_to_core(manifold, direction, penalty * force)
    Y = manifold.retr(X, -lr * direction)
    if not momentum or buffer is None:
        return Y, None
    if is_factored(manifold):
        return Y, factored_transport(manifold, X, Y, buffer)
    return Y, manifold.transp(X, Y, buffer)


class CondLR(GeometricOptimizer):
    r"""Robust low-rank SGD: drop-in for ``torch.optim.SGD`` on models with low-rank layers.

    Parameters that live on a geoopt manifold (the packed weights of :mod:`lrmanifold.nn`, or any
    ``geoopt.ManifoldParameter``) take a Riemannian step, see :func:`condlr_update`: the autograd
    gradient is projected to the tangent space with the exact factor metric :math:`(SS^\top)^{-1}`,
    momentum is transported, and the retraction of the parameter's manifold brings the point home.
    On :class:`~lrmanifold.WellConditioned` the condition number is at most 1 + τ after every step.
    All other parameters take the step of ``torch.optim.SGD`` with the same momentum.

    One backward pass a step. ``.grad`` is only read. No m x n matrix is formed.

    Parameters
    ----------
    params : iterable
        Parameters, named parameters, or groups (see :func:`lrmanifold.optim.param_groups`).
    lr : float
        Learning rate.
    momentum : float
        In [0, 1).
    nesterov : bool
        Needs ``momentum > 0``.
    weight_decay : float
        L2 decay; on a low-rank weight it acts on S alone, as the gradient of ½ wd ‖W‖² does.
    penalty : float
        Weight β of RobustDLRT's regulariser R(S). Its gradient acts on S beside the momentum, not
        through it. An option of the group like `lr`: schedule it by writing
        ``optimizer.param_groups[i]["penalty"]`` or with
        :class:`~lrmanifold.optim.OptionScheduler`.
    penalty_squared : bool
        β R(S)² instead: smooth where the core is perfectly conditioned.
    metric : {"exact", "scalar"}
        "scalar" replaces :math:`(SS^\top)^{-1}` by its mean size, the number :math:`r/\|S\|^2`. It
        is the gradient for another Riemannian metric on the same manifold,
        :math:`\|S\|^2/r\,(\|\dot U\|^2 + \|\dot V\|^2) + \|\dot S\|^2` for (U̇ S Vᵀ + U Ṡ Vᵀ +
        U S V̇ᵀ) with UᵀU̇ = 0 and VᵀV̇ = 0, which does not depend on the gauge: a descent direction, 0
        at the same points, and the same where S is a multiple of an orthogonal matrix. On cores of
        condition number 1 + τ the two differ by factors in [(1 + τ)⁻², (1 + τ)²]. It saves two of
        eight products of the step; on cores far from orthogonal it converges more slowly.
    clip_margin : float
        In [0, 1). A core that leaves the band of ratio 1 + τ is brought back to it by the exact
        projection if 0, and further, to the ratio 1 + (1 - margin) τ, otherwise. Then fewer steps
        change the core, and those near the last core that was decomposed need no decomposition
        (Weyl's inequality; :class:`lrmanifold.linalg.ClipMemory`).
    orthonormality_tol : float
        If positive, bases are retracted only when ‖UᵀU - I‖_F, which every step measures, exceeds
        it; the condition number is then off by that much too. At most what counts as rounding of
        storage: 1e-4 in float32, 1e-6 in float64. Saves one product of four; accelerators retract
        always, as to decide they would have to be waited for.
    maximize : bool
        Ascend instead. Decay and penalty still pull inwards.
    skip_nonfinite : bool
        Leave a parameter and its momentum bit for bit as they are when its gradient holds NaN or
        Inf, and count it in ``state[p]["skipped"]``. If False, the CPU raises FloatingPointError.
    distribute : bool
        For replicas with equal gradients (DistributedDataParallel): each rank of the default
        process group computes the steps of its share of the low-rank weights, and sends weights and
        momentum to the others, so that every rank has all of both. Pays where a step costs more
        than sending it. Sharded parameters (``fully_shard``) need no option: see the notes.

    Raises
    ------
    ValueError
        For options out of range.
    GeometryError
        In :meth:`step`, if a parameter lost its manifold or is off it by more than rounding.

    Notes
    -----
    With FSDP2 build the optimizer after ``fully_shard``. A step gathers one weight after the other,
    every process moves it, and each keeps its rows; momentum is sharded like the weight.

    torch's flags `foreach`, `fused`, `capturable`, `differentiable` and `dampening` do not exist
    here; passing one is a TypeError.

    References
    ----------
    D. Savostianova et al., *Robust low-rank training via approximate orthonormal constraints*,
    NeurIPS 2023; for the metric mathematics 1.

    Examples
    --------
    >>> model = lrmanifold.factorize(model, rank=0.2, tau=0.1)
    >>> optimizer = lrmanifold.optim.CondLR(model.parameters(), lr=0.1, momentum=0.3)
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        penalty: float = 0.0,
        penalty_squared: bool = False,
        metric: Metric = "exact",
        clip_margin: float = 0.0,
        orthonormality_tol: float = 0.0,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        distribute: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "penalty": penalty,
            "penalty_squared": penalty_squared,
            "metric": metric,
            "clip_margin": clip_margin,
            "orthonormality_tol": orthonormality_tol,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
        }
        super().__init__(params, defaults)
        self._distribute = bool(distribute)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']!r}")
        if not 0.0 <= group["clip_margin"] < 1.0:
            raise ValueError(f"clip_margin must be in [0, 1), got {group['clip_margin']!r}")
        for p in group["params"]:
            limit = storage_tolerance(p.dtype)
            if not 0.0 <= group["orthonormality_tol"] <= limit:
                raise ValueError(
                    f"orthonormality_tol must be in [0, {limit:g}] for {p.dtype}, "
                    f"got {group['orthonormality_tol']!r}"
                )
        if group["metric"] not in ("exact", "scalar"):
            raise ValueError(f"metric must be 'exact' or 'scalar', got {group['metric']!r}")
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov=True needs momentum > 0, got momentum = 0")

    def _update(
        self,
        p: Tensor,
        grad: Tensor,
        manifold: geoopt.Manifold | None,
        group: dict[str, Any],
        state: dict[str, Any],
        ok: Ok,
    ) -> Ok:
        if manifold is None:
            self._euclidean_step(p, grad, group, state, ok)
            return ok
        if isinstance(manifold, FixedRank) and is_factored(manifold):
            return self._factored_step(p, grad, manifold, group, state, ok)
        Y, moved = condlr_update(
            manifold,
            p,
            grad,
            state.get("momentum_buffer"),
            **{key: group[key] for key in Options._fields if key not in _FACTORED_ONLY},
        )
        ok = and_finite(ok, Y)
        commit(p, Y, ok)
        if moved is not None:
            store(state, "momentum_buffer", moved, ok)
        else:
            # Not transported, it would be no tangent vector when momentum is switched on again.
            state.pop("momentum_buffer", None)
        return ok

    def _factored_step(
        self,
        p: Tensor,
        grad: Tensor,
        manifold: FixedRank,
        group: dict[str, Any],
        state: dict[str, Any],
        ok: Ok,
    ) -> Ok:
        """The step in velocities, without a copy of the weight where nobody has to be asked."""
        wide = linalg.compute_dtype(p.dtype)
        X = unpack(p.detach(), manifold.m, manifold.n)
        G = unpack(grad.to(wide), manifold.m, manifold.n)
        options = Options(**{key: group[key] for key in Options._fields})
        before = None
        if group["momentum"] and "momentum_buffer" in state:
            before = Momentum(
                **{
                    name: state[key].to(wide)
                    for name, key in zip(Momentum._fields, MOMENTUM_STATE, strict=True)
                    if key in state
                }
            )
        wide_X = Factors(*(x.to(wide) for x in X))
        cores = self._cores.setdefault(p, linalg.ClipMemory())
        step = factored_step(manifold, wide_X, G, before, options, self._workspace, cores)
        if isinstance(ok, bool):
            and_finite(ok, step.S)  # the bases have been measured
            step.write_(X)
        else:
            Y = step.packed()
            ok = and_finite(ok, Y)
            commit(p, Y, ok)
        if step.momentum is not None and isinstance(ok, bool) and p.dtype == wide:
            self._workspace.swap("velocity", step.momentum.velocity, state.get("momentum_buffer"))
        for key, value in zip(MOMENTUM_STATE, step.momentum or (None,) * 3, strict=True):
            if value is None:
                # Not transported, it would be of no use when momentum is switched on again.
                state.pop(key, None)
            elif isinstance(ok, bool):
                state[key] = value.to(p.dtype)
            else:
                store(state, key, value.to(p.dtype), ok)
        return ok

    def _shared_state(self, item: Item) -> dict[str, tuple[int, ...] | None]:
        group, p, manifold, _ = item
        shape, momentum = tuple(p.shape), bool(group["momentum"])
        factored = momentum and is_factored(manifold)
        overlap = (*shape[:-2], 2, shape[-1], shape[-1]) if factored else None
        waits = overlap if group["orthonormality_tol"] else None
        shapes = shape if momentum else None, overlap, waits
        return dict(zip(MOMENTUM_STATE, shapes, strict=True))

    def _bundle_key(
        self, group: dict[str, Any], p: Tensor, manifold: geoopt.Manifold | None
    ) -> Any:
        key = bundle_key(manifold, p, self.state.get(p, {}))
        return p if key is None else (id(group), key)

    def _step_together(
        self,
        manifold: FixedRank,
        params: Sequence[Tensor],
        grads: Tensor,
        group: dict[str, Any],
        states: Sequence[dict[str, Any]],
        ok: Tensor | None,
    ) -> Tensor | None:
        options = Options(**{key: group[key] for key in Options._fields})
        return step_together(manifold, params, grads, states, options, ok)

    def momentum(self, p: Tensor) -> Tensor:
        """The momentum of a parameter: a tangent vector at its present point, 0 before a step.

        The state keeps it in coordinates that suit the step: on a low-rank weight with the
        retraction "factored" ``state[p]["momentum_buffer"]`` holds the velocities (U̇, Ṡ, V̇) of the
        factors, packed, and ``state[p]["momentum_overlap"]`` what is still to be subtracted from
        them, see `lrmanifold/optim/_factored.py`.

        Returns
        -------
        Tensor, shape of `p`
            Packed for low-rank weights. Of a sharded parameter sharded like it; all its processes
            have to ask together.
        """
        state, manifold = self.state.get(p, {}), manifold_of(p)
        buffer = state.get("momentum_buffer")
        if buffer is None:
            return torch.zeros_like(p.detach())
        if isinstance(manifold, FixedRank) and "momentum_overlap" in state:
            X, velocity = gathered(p.detach()), gathered(buffer)
            found = tangent_momentum(manifold, X, Momentum(velocity, state["momentum_overlap"]))
            return sharded_like(p, found) if is_sharded(p) else found
        return buffer.clone()

    def _euclidean_step(
        self, p: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Any], ok: Ok
    ) -> None:
        """The step of torch.optim.SGD."""
        momentum = group["momentum"]
        if group["weight_decay"]:
            grad = grad + group["weight_decay"] * p
        if momentum:
            buffer = state.get("momentum_buffer")
            buffer = grad if buffer is None else momentum * buffer + grad
            store(state, "momentum_buffer", buffer, ok)
            grad = grad + momentum * buffer if group["nesterov"] else buffer
        commit(p, p - group["lr"] * grad, ok)
