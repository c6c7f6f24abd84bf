"""CondLR: stochastic gradient descent on the manifold of well-conditioned low-rank matrices."""

from __future__ import annotations

from typing import Any

import geoopt
from torch import Tensor

from .. import linalg
from ..manifolds import FixedRank
from ._base import GeometricOptimizer, Ok, and_finite, commit, store


def add_to_core(manifold: FixedRank, xi: Tensor, term: Tensor) -> Tensor:
    """Add a matrix to the block M of a packed tangent vector."""
    U_p, M, V_p = manifold.unpack(xi)
    return manifold.pack(U_p, M + term, V_p)


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
    xi = manifold.egrad2rgrad(X, G)
    low_rank = isinstance(manifold, FixedRank)
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
    return Y, (manifold.transp(X, Y, buffer) if momentum and buffer is not None else None)


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
    maximize : bool
        Ascend instead. Decay and penalty still pull inwards.
    skip_nonfinite : bool
        Leave a parameter and its momentum bit for bit as they are when its gradient holds NaN or
        Inf, and count it in ``state[p]["skipped"]``. If False, the CPU raises FloatingPointError.

    Raises
    ------
    ValueError
        For options out of range.
    GeometryError
        In :meth:`step`, if a parameter lost its manifold or is off it by more than rounding.

    Notes
    -----
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
        maximize: bool = False,
        skip_nonfinite: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "penalty": penalty,
            "penalty_squared": penalty_squared,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
        }
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']!r}")
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
        buffer = state.get("momentum_buffer")
        if manifold is None:
            self._euclidean_step(p, grad, group, state, ok)
            return ok
        Y, moved = condlr_update(
            manifold,
            p,
            grad,
            buffer,
            lr=group["lr"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
            penalty=group["penalty"],
            penalty_squared=group["penalty_squared"],
        )
        ok = and_finite(ok, Y)
        commit(p, Y, ok)
        if moved is not None:
            store(state, "momentum_buffer", moved, ok)
        else:
            # Not transported, it would be no tangent vector when momentum is switched on again.
            state.pop("momentum_buffer", None)
        return ok

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
