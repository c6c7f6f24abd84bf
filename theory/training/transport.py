r"""CondLR transports momentum, whatever the retraction.

**Statement.** Let b be the momentum of :class:`lrmanifold.optim.CondLR` at Y, with factor β. After
a step with the gradient G the momentum at Y⁺ is T(βb + P_Y G), where for every retraction but
"factored"

    Tξ = P_{Y⁺}ξ,    so that ‖Tξ - ξ‖ <= ‖Y⁺ - Y‖ ‖ξ‖/max(σ_r(Y), σ_r(Y⁺))    (L3.3),

and for "factored", with ξ = U̇SVᵀ + UṠVᵀ + USV̇ᵀ and the bases U⁺, V⁺ into which U, V move,

    Tξ = (P U̇) S⁺V⁺ᵀ + U⁺ṠV⁺ᵀ + U⁺S⁺(Q V̇)ᵀ,    P = I - U⁺U⁺ᵀ, Q = I - V⁺V⁺ᵀ:

the velocities of the factors are kept. In T6 another transport than the projection adds β‖Tb - P_Y
b‖ to V⁺ (the same proof).

Checked for every retraction the library has, with and without a bound on the condition number,
through the optimizer's public methods, against these formulas in dense algebra. A momentum that is
left as it is was once returned by the library for all retractions but "factored", and no test had
noticed. Ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import geoopt
import torch
from torch import Tensor

import lrmanifold as lrm

from ..core import Claim, Control, Evidence, Sample, Source, identity, largest
from ..sampling import Draw, eps

LOSS = 1.0  # of ‖Y⁺ - Y‖‖b‖/σ_r
BETA, LR = 0.9, 0.05
ROUNDING = 16.0


def sample(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    draw = Draw(seed, dtype, device, **fixed)
    m, n, r = draw.size(3, 9)
    tau = draw.choose(None, None, 0.0, 0.3)
    names = lrm.retractions.available()
    name = names[seed % len(names)] if tau is None else "factored"
    manifold: lrm.FixedRank
    if tau is None:
        manifold = lrm.FixedRank(m, n, r, retraction=name)
    else:
        manifold = lrm.WellConditioned(m, n, r, tau=tau)
    X = manifold.from_dense(draw.give(draw.point(m, n, r, draw.cond(1.0, 3.0)).U) @ draw.give(
        draw.core(draw.spectrum(r, 2.0))) @ draw.give(draw.frame(n, r)).mT)  # fmt: skip
    gradients = [draw.give(draw.normal(m, n)) / (m * n) ** 0.5 for _ in range(3)]
    return {"manifold": manifold, "X": X, "gradients": gradients, "retraction": name}


def trained(manifold: lrm.FixedRank, X: Tensor, gradients: list[Tensor]):
    """(point, momentum) as dense matrices after each step of CondLR with these gradients."""
    p = geoopt.ManifoldParameter(X.clone(), manifold=manifold)
    optimizer = lrm.optim.CondLR([p], LR, momentum=BETA)
    out = []
    for G in gradients:
        optimizer.zero_grad()
        (manifold.to_dense(p) * G).sum().backward()
        optimizer.step()
        b = optimizer.momentum(p)
        out.append((p.detach().clone(), b.detach().clone()))
    return out


def transported(manifold: lrm.FixedRank, Y: Tensor, new: Tensor, b: Tensor) -> Tensor:
    """T of a dense tangent vector b, dense."""
    if manifold.retraction == "factored":
        (U, S, V), (U_1, S_1, V_1) = manifold.unpack(Y), manifold.unpack(new)
        S_dot = U.mT @ b @ V
        U_dot = torch.linalg.solve(S, b @ V - U @ S_dot, left=False)
        V_dot = torch.linalg.solve(S.mT, b.mT @ U - V @ S_dot.mT, left=False)
        U_dot, V_dot = U_dot - U_1 @ (U_1.mT @ U_dot), V_dot - V_1 @ (V_1.mT @ V_dot)
        return U_dot @ S_1 @ V_1.mT + U_1 @ S_dot @ V_1.mT + U_1 @ S_1 @ V_dot.mT
    return manifold.tangent_to_dense(new, manifold.project_ambient(new, b))


def untransported(manifold: lrm.FixedRank, Y: Tensor, new: Tensor, b: Tensor) -> Tensor:
    """What a momentum buffer that is left as it is stands for at the new point."""
    return manifold.tangent_to_dense(new, manifold.project_ambient(Y, b))


def check(
    sample: Sample,
    *,
    loss: float = LOSS,
    transport: Callable[..., Tensor] = transported,
) -> Evidence:
    M, X, gradients = sample["manifold"], sample["X"], sample["gradients"]
    Y, b = X, torch.zeros_like(gradients[0])
    deviations = []
    scale = ROUNDING * eps(X) * sum(float(G.norm()) for G in gradients) / (1.0 - BETA)
    for (new, packed), G in zip(trained(M, X, gradients), gradients, strict=True):
        b = BETA * b + M.tangent_to_dense(Y, M.project_ambient(Y, G))
        expected, found = transport(M, Y, new, b), M.tangent_to_dense(new, packed)
        deviations.append((expected - found).norm())
        if M.retraction != "factored":
            s = torch.maximum(*(M.svdvals(Z)[..., -1] for Z in (Y, new)))
            moved = (M.to_dense(new) - M.to_dense(Y)).norm()
            deviations.append((found - b).norm() - loss * moved * b.norm() / s)
        Y, b = new, found
    detail = {"retraction": sample["retraction"]}
    return identity(largest(deviations), tolerance=scale, detail=detail)


CLAIM = Claim(
    id="training/transport",
    title="CondLR transports its momentum, whatever the retraction",
    statement=(
        r"b^+=T(\beta b+P_YG),\quad T=P_{Y^+};\quad \text{factored}:\ (P\dot U)S^+V^{+\top}"
        r"+U^+\dot SV^{+\top}+U^+S^+(Q\dot V)^\top"
    ),
    hypotheses=("CondLR with momentum β, any retraction, any τ",),
    source=Source("ours", "theory/training/transport.py; L3.3"),
    sample=sample,
    check=check,
    controls=(Control("momentum left as it is", partial(check, transport=untransported)),),
    trials=60,
    float32="16 eps Σ‖G‖/(1 - β): frames of the new point, and the sum of the momentum",
    kind="identity",
)
