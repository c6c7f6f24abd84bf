"""The steps of Riemannian Adam and of AdamW as rules; see :mod:`lrmanifold.optim.step`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import geoopt
import torch
from torch import Tensor

from ..precision import compute_dtype
from .coordinates import Ambient, Blocks
from .step import State, along, core_force


def adam(M: Ambient, X: Blocks, G: Blocks, state: State, o: Mapping[str, Any]) -> tuple:
    """First moment a tangent vector, transported; second moments one number a block.

    Entrywise second moments would depend on the gauge of the factors and leave the tangent space.
    Decay and penalty act on the core, outside of the moments, as in AdamW.
    """
    beta1, beta2 = o["betas"]
    xi = M.tangent(X, G)
    first = xi._make(torch.lerp(b, x, 1 - beta1) for b, x in zip(state["exp_avg"], xi, strict=True))
    second = beta2 * state["exp_avg_sq"] + (1 - beta2) * M.block_moments(X, xi)
    root = (second / bias_correction(beta2, state["step"])).sqrt() + o["eps"]
    # With eps = 0 a block that is zero by its nature (U_p at r = m), or whose squares underflow,
    # stays as it is.
    scale = 1.0 / (root * bias_correction(beta1, state["step"]))
    scale = torch.where(root > torch.finfo(root.dtype).tiny ** 0.5, scale, 0.0)
    force = None
    if M.low_rank:
        # Transport moves momentum from block to block, away from the second moment that it was
        # gathered with: unlimited, a step can grow without end.
        size = M.block_moments(X, first).sqrt() * scale
        scale = scale / size.clamp_min(1.0)
        force = core_force(X, o)
    Y, moved = M.advance(X, first, scale, force, o["lr"])
    return Y, {"exp_avg": moved, "exp_avg_sq": second}


def adamw(M: Any, x: Tensor, g: Tensor, state: State, o: Mapping[str, Any]) -> tuple:
    """The step of ``torch.optim.AdamW``, entry by entry."""
    beta1, beta2 = o["betas"]
    first = torch.lerp(state["exp_avg"], g, 1 - beta1)
    second = beta2 * state["exp_avg_sq"] + (1 - beta2) * g.square()
    root = (second / bias_correction(beta2, state["step"])).sqrt() + o["eps"]
    direction = first / (root * bias_correction(beta1, state["step"]))
    if o["weight_decay"]:
        direction = direction.add(x, alpha=o["weight_decay"])
    return along(x, direction, o["lr"]), {"exp_avg": first, "exp_avg_sq": second}


def bias_correction(beta: float, step: float | Tensor) -> float | Tensor:
    """``1 - beta^step``, without the cancellation that would cost float32 half its digits."""
    if isinstance(step, Tensor) and beta:
        return -torch.expm1(step * math.log(beta))
    return 1.0 - beta**step


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
    """One step of Riemannian Adam of one point, by the manifold's own methods.

    On :class:`~lrmanifold.WellConditioned` each of the blocks U_p, M, V_p has a second moment of
    its own, which trains networks better (a transformer's loss by 2 to 5 %:
    ``python -m benchmarks.transformer_adam --rules``). On a plain
    :class:`~lrmanifold.FixedRank` the whole vector has one: there blocks of a size of their own
    turn the directions of tiny singular values by noise, and quadratics of high rank, completion
    of ill-conditioned matrices and adaptive ranks go wrong (benchmarks/second_moments.py). The
    step's entries have a mean square of at most 1.

    Parameters
    ----------
    manifold : geoopt.Manifold
    X, G : Tensor
        Point, and the Euclidean gradient with respect to it.
    first : Tensor or None
        Tangent vector at `X`.
    second : Tensor or None
        Shape (..., 3) for the blocks of a low-rank weight.
    step : float or Tensor
        Number of this step, from 1.
    lr, betas, eps, weight_decay, penalty, penalty_squared
        As in :class:`CondLRAdam`.

    Returns
    -------
    Y, first, second : Tensor
        The new point, the first moment as a tangent vector there, the second moment (in float32 for
        float16 and bfloat16).
    """
    M, wide = Ambient(manifold), compute_dtype(X.dtype)
    options = {
        "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "penalty": penalty,
        "penalty_squared": penalty_squared,
    }  # fmt: skip
    x, g = M.split(X.to(wide)), M.split(G.to(wide))
    zero = torch.zeros_like(X) if first is None else first
    state = {
        "exp_avg": M.split(zero.to(wide)),
        "exp_avg_sq": 0.0 if second is None else second,
        "step": step,
    }
    Y, new = adam(M, x, g, state, options)
    return M.join(Y).to(X.dtype), M.join(new["exp_avg"]).to(X.dtype), new["exp_avg_sq"]
