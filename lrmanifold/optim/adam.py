"""Riemannian Adam on the manifold of well-conditioned low-rank matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

from .. import linalg
from ..factors import unpack
from ..manifolds import Factors, FixedRank
from ._base import GeometricOptimizer, Item, Ok, and_finite, commit, store
from ._factored import is_factored
from ._factored_adam import factored_adam_step
from ._moments import means_of_blocks
from ._together import bundle_key, write_together
from .condlr import add_to_core

# Entries of the state of a weight, and what the step of a low-rank one is told.
_STATE = ("exp_avg", "exp_avg_sq")
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "penalty", "penalty_squared")


def block_moments(manifold: geoopt.Manifold, X: Tensor, xi: Tensor) -> Tensor:
    """Mean square of the entries that share a second moment.

    Shape (..., 3) for the blocks U_p, M, V_p of a low-rank weight, each for itself with a bound on
    the condition number, three times that of the whole vector without one (see
    :func:`adam_update`); (..., 1) on other manifolds, from their metric.
    """
    if isinstance(manifold, FixedRank):
        sums = torch.stack([b.square().sum((-2, -1)) for b in manifold.unpack(xi)], -1)
        return means_of_blocks(manifold, sums)
    inner = manifold.inner(X, xi, keepdim=True)
    return inner * (inner.numel() / xi.numel())


def scale_blocks(manifold: geoopt.Manifold, xi: Tensor, scale: Tensor) -> Tensor:
    """Multiply each block by its own scalar, which keeps a tangent vector tangent."""
    if isinstance(manifold, FixedRank):
        blocks = manifold.unpack(xi)
        return manifold.pack(*(b * scale[..., i, None, None] for i, b in enumerate(blocks)))
    return xi * scale


def adam_update(
    manifold: geoopt.Manifold,
    X: Tensor,
    G: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    step: float | Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    penalty: float,
    penalty_squared: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Riemannian Adam as a pure function.

    The first moment is a tangent vector and is transported. Entrywise second moments would depend
    on the gauge of the factors and leave the tangent space. On
    :class:`~lrmanifold.WellConditioned` each of the blocks U_p, M, V_p has a scalar of its own,
    which trains networks better (2 to 5 % of a transformer's loss). On a plain
    :class:`~lrmanifold.FixedRank` the whole vector has one: there blocks of a size of their own
    turn the directions of tiny singular values by noise, and quadratics of high rank, completion
    of ill-conditioned matrices and adaptive ranks go wrong (benchmarks/second_moments.py). The
    step's entries have a mean square of at most 1. Decay and penalty act on S, outside the moments
    (as in AdamW).

    Parameters
    ----------
    manifold : geoopt.Manifold
    X, G : Tensor
        Point, and the Euclidean gradient with respect to it.
    first : Tensor or None
        Tangent vector at `X`.
    second : Tensor or None
        See :func:`block_moments`.
    step : float or Tensor
        Number of this step, from 1.

    Returns
    -------
    Y, first, second : Tensor
        The new point, the first moment as a tangent vector there, the second moment (in float32 for
        float16 and bfloat16).
    """
    xi = manifold.egrad2rgrad(X, G)
    # Squares, and eps with them, are below the smallest number of float16.
    wide = linalg.compute_dtype(X.dtype)
    square = block_moments(manifold, X.to(wide), xi.to(wide))
    first = (1 - betas[0]) * xi if first is None else betas[0] * first + (1 - betas[0]) * xi
    second = (1 - betas[1]) * square + (0.0 if second is None else betas[1] * second)
    root = (second / _bias_correction(betas[1], step)).sqrt() + eps
    # With eps = 0 a block that is zero by its nature (U_p at r = m) stays zero.
    divisor = (root * _bias_correction(betas[0], step)).clamp_min(torch.finfo(root.dtype).tiny)
    direction = scale_blocks(manifold, first.to(wide), 1.0 / divisor)
    if isinstance(manifold, FixedRank):
        # Transport moves momentum from block to block, away from the second moment that it was
        # gathered with: unlimited, a step can grow without end.
        size = block_moments(manifold, X.to(wide), direction)
        direction = scale_blocks(manifold, direction, size.clamp_min(1.0).rsqrt())
    direction = direction.to(X.dtype)
    if isinstance(manifold, FixedRank) and (weight_decay or penalty):
        S = manifold.unpack(X).S
        term = weight_decay * S
        if penalty:
            force = linalg.conditioning_penalty_grad(S, squared=penalty_squared)
            term = term + penalty * force
        direction = add_to_core(manifold, direction, term)
    Y = manifold.retr(X, -lr * direction)
    return Y, manifold.transp(X, Y, first), second


def _bias_correction(beta: float, step: float | Tensor) -> float | Tensor:
    """``1 - beta^step``, without the cancellation that would cost float32 half its digits."""
    if isinstance(step, Tensor) and beta:
        return -torch.expm1(step * math.log(beta))
    return 1.0 - beta**step


class CondLRAdam(GeometricOptimizer):
    r"""Robust low-rank Adam: drop-in for ``torch.optim.AdamW`` on models with low-rank layers.

    Parameters on a manifold take the step of :func:`adam_update`; all others that of
    ``torch.optim.AdamW``. On :class:`~lrmanifold.WellConditioned` the condition number is at most
    1 + τ after every step.

    Because the step is scaled to entries of size 1, `lr` has about the meaning that it has
    for a dense weight; rates a little above AdamW's are usual (the step has (m + r + n) r entries
    of size `lr` instead of m n).

    Parameters
    ----------
    params : iterable
        Parameters, named parameters, or groups (see :func:`lrmanifold.optim.param_groups`).
    lr : float
    betas : (float, float)
        In [0, 1).
    eps : float
    weight_decay : float
        Decoupled; on a low-rank weight it shrinks S.
    penalty : float
        Weight β of RobustDLRT's regulariser R(S), decoupled too.
    penalty_squared : bool
        β R(S)² instead.
    maximize : bool
    skip_nonfinite, distribute : bool
        As in :class:`CondLR`.

    Raises
    ------
    ValueError
        For options out of range.
    GeometryError
        In :meth:`step`, if a parameter lost its manifold or is off it by more than rounding.

    References
    ----------
    G. Becigneul and O.-E. Ganea, *Riemannian adaptive optimization methods*, 2019;
    I. Loshchilov and F. Hutter, *Decoupled weight decay regularization*, 2019.
    """

    _non_negative = ("lr", "weight_decay", "penalty", "eps")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        penalty: float = 0.0,
        *,
        penalty_squared: bool = False,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        distribute: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "penalty": penalty,
            "penalty_squared": penalty_squared,
            "maximize": maximize,
            "skip_nonfinite": skip_nonfinite,
        }
        super().__init__(params, defaults)
        self._distribute = bool(distribute)

    def _shared_state(self, item: Item) -> dict[str, tuple[int, ...] | None]:
        _, p, _, _ = item
        return {"exp_avg": tuple(p.shape), "exp_avg_sq": (*p.shape[:-2], 3)}

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        betas = group["betas"]
        if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")

    def _bundle_key(
        self, group: dict[str, Any], p: Tensor, manifold: geoopt.Manifold | None
    ) -> Any:
        key = bundle_key(manifold, p, self.state.get(p, {}), _STATE)
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
        X = torch.stack([p.detach() for p in params])
        first, second = (
            torch.stack([state[key] for state in states]) if key in states[0] else None
            for key in _STATE
        )
        step = torch.stack([state["step"] for state in states])[:, None].to(X.dtype) + 1.0
        options = {k: group[k] for k in _OPTIONS}
        Y, *after = adam_update(manifold, X, grads, first, second, step, **options)
        return write_together(params, states, Y, dict(zip(_STATE, after, strict=True)), ok)

    def _update(
        self,
        p: Tensor,
        grad: Tensor,
        manifold: geoopt.Manifold | None,
        group: dict[str, Any],
        state: dict[str, Any],
        ok: Ok,
    ) -> Ok:
        first, second = (state.get(key) for key in _STATE)
        # Where the step lives on an accelerator it stays there: the host must not wait for it.
        done = state["step"]
        step = float(done) + 1.0 if done.device.type == "cpu" else done.to(torch.float32) + 1.0
        if manifold is None:
            dense = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay")}
            Y, first, second = _adamw(p, grad, first, second, step, **dense)
        else:
            options = {k: group[k] for k in _OPTIONS}
            single = isinstance(manifold, FixedRank) and p.ndim == 2 and p.device.type == "cpu"
            fast = single and is_factored(manifold)
            if fast and self._factored_step(p, grad, manifold, state, options):
                return ok
            Y, first, second = adam_update(manifold, p, grad, first, second, step, **options)
        ok = and_finite(and_finite(ok, Y), second)
        commit(p, Y, ok)
        store(state, "exp_avg", first, ok)
        store(state, "exp_avg_sq", second, ok)
        return ok

    def _factored_step(
        self,
        p: Tensor,
        grad: Tensor,
        manifold: FixedRank,
        state: dict[str, Any],
        options: dict[str, Any],
    ) -> bool:
        """The same step by fewer products; False, with nothing done, where it is too long."""
        wide = linalg.compute_dtype(p.dtype)
        X = unpack(p.detach(), manifold.m, manifold.n)
        first = state.get("exp_avg")
        found = factored_adam_step(
            manifold,
            Factors(*(x.to(wide) for x in X)),
            unpack(grad.to(wide), manifold.m, manifold.n),
            None if first is None else first.to(wide),
            state.get("exp_avg_sq"),
            float(state["step"]) + 1.0,
            options,
            self._workspace,
            self._cores.setdefault(p, linalg.ClipMemory()),
        )
        if found is None:
            return False
        and_finite(and_finite(True, found.step.S), found.second)  # the bases have been measured
        found.step.write_(X)
        if p.dtype == wide:
            self._workspace.swap("transported", found.first, first)
        state["exp_avg"], state["exp_avg_sq"] = found.first.to(p.dtype), found.second
        return True


def _adamw(
    p: Tensor,
    grad: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    step: float | Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The step of torch.optim.AdamW, with second moments in float32 or wider."""
    first = torch.lerp(torch.zeros_like(p) if first is None else first, grad, 1 - betas[0])
    square = grad.to(linalg.compute_dtype(p.dtype)).square()
    second = (1 - betas[1]) * square + (0.0 if second is None else betas[1] * second)
    root = (second / _bias_correction(betas[1], step)).sqrt() + eps
    rate = lr / _bias_correction(betas[0], step)
    moved = p * (1 - lr * weight_decay) - rate * (first / root)
    return moved.to(p.dtype), first, second
