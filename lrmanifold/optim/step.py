"""The step of CondLR, and of SGD: the algorithm on one screen.

A rule is a pure function ``(M, X, G, state, options) -> (Y, state)``. `X` is a point in blocks
(``Factors`` U, S, V of a low-rank weight, with any leading dimensions), `G` its Euclidean gradient,
`state` maps names to vectors in the same blocks, `options` is the parameter group. `M` says in
which coordinates vectors are kept and how points move (:mod:`lrmanifold.optim.coordinates`).
Devices, batches, NaN and files are the engine's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import geoopt
from torch import Tensor

from .. import linalg
from .coordinates import Ambient, Blocks, along, combine

Metric = Literal["exact", "scalar"]
State = dict[str, Any]


def condlr(M: Ambient, X: Blocks, G: Blocks, state: State, o: Mapping[str, Any]) -> tuple:
    """b ← ξ + μ b, then the point moves along -lr (b + β∇R(S)) by the retraction.

    In the coordinates of a low-rank weight, velocities of the factors, that reads

        b_U ← (I - UUᵀ)(g_U (SSᵀ)⁻¹ + μ b_U),   U ← polar(U - lr b_U),   the same for V,
        b_S ← g_S + wd S + μ b_S,   S ← project_core(S - lr (b_S + β∇R(S))).

    The projection that the gradient needs transports the momentum too. Decay and penalty depend on
    the singular values alone, so they act on S; the penalty is a force of the present core and does
    not enter the momentum. D. Savostianova et al., NeurIPS 2023; mathematics 1.
    """
    mu = o["momentum"]
    G = M.add_to_core(G, core_force(X, o, penalty=False))
    before = state["momentum_buffer"] if mu else None
    d = b = M.project(X, M.velocity(X, G, o["metric"], before, mu))
    if o["nesterov"]:
        d = combine(M.project(X, M.velocity(X, G, o["metric"])), b, mu)
    Y = M.retract(X, M.add_to_core(d, core_force(X, o, decay=False)), o["lr"])
    return Y, {"momentum_buffer": M.transport(X, Y, b)} if mu else {}


def sgd(M: Any, x: Tensor, g: Tensor, state: State, o: Mapping[str, Any]) -> tuple:
    """The step of ``torch.optim.SGD``, entry by entry."""
    mu = o.get("momentum", 0.0)
    if o["weight_decay"]:
        g = g.add(x, alpha=o["weight_decay"])
    b = g.add(state["momentum_buffer"], alpha=mu) if mu else g
    d = g.add(b, alpha=mu) if mu and o["nesterov"] else b
    return along(x, d, o["lr"]), {"momentum_buffer": b} if mu else {}


def core_force(
    X: Any, o: Mapping[str, Any], *, decay: bool = True, penalty: bool = True
) -> Tensor | None:
    """wd S + β∇R(S), what decay and penalty do to the core; None where both are off."""
    force = None
    if decay and o["weight_decay"]:
        force = o["weight_decay"] * X.S
    if penalty and o["penalty"]:
        slope = linalg.conditioning_penalty_grad(X.S, squared=o["penalty_squared"])
        force = o["penalty"] * slope if force is None else force.add(slope, alpha=o["penalty"])
    return force


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
    """One CondLR step of one point, with tangent vectors as the manifold has them.

    The rule ``condlr`` by the manifold's own `egrad2rgrad`, `retr` and `transp`. It works on
    every geoopt manifold and is the reference for what :class:`CondLR` computes.

    Parameters
    ----------
    manifold : geoopt.Manifold
    X : Tensor
        Point; for low-rank weights packed, (..., m + r + n, r).
    G : Tensor
        Euclidean gradient with respect to `X`, as autograd returns it.
    buffer : Tensor or None
        Momentum, a tangent vector at `X`; None before the first step.
    lr, momentum, nesterov, weight_decay, penalty, penalty_squared, metric
        As in :class:`CondLR`.

    Returns
    -------
    Y, buffer : Tensor, Tensor or None
        New point, and the momentum as a tangent vector there (None without momentum).
    """
    M = Ambient(manifold)
    options = {
        "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
        "penalty": penalty, "penalty_squared": penalty_squared, "metric": metric,
    }  # fmt: skip
    zero = X.new_zeros(X.shape) if buffer is None else buffer
    Y, state = condlr(M, M.split(X), M.split(G), {"momentum_buffer": M.split(zero)}, options)
    return M.join(Y), M.join(state["momentum_buffer"]) if state else None
