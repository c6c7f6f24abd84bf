"""Geodesics of the fixed-rank manifold, by integration in 2r-dimensional coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import linalg
from ..errors import GeometryError
from ..factors import Factors, joined

_State = tuple[Tensor, ...]


def _velocity(state: _State) -> _State:
    """Right-hand side of the geodesic equation for (U, S, V, U_p, M, V_p).

    From P_W(Ẅ) = 0 and the gauge UᵀU̇ = 0, VᵀV̇ = 0, U̇ = U_p S⁻¹, V̇ = V_p S⁻ᵀ, Ṡ = M.
    """
    U, S, V, U_p, M, V_p = state
    inv = torch.linalg.inv_ex(S)[0]
    dU, dV = U_p @ inv, V_p @ inv.mT
    uu, vv = U_p.mT @ U_p, V_p.mT @ V_p
    dM = inv.mT @ uu + vv @ inv.mT
    dU_p = -dU @ M - U @ (inv.mT @ uu)
    dV_p = -dV @ M.mT - V @ (inv @ vv)
    return dU, M, dV, dU_p, dM, dV_p


def _add(state: _State, h: float, *slopes: tuple[float, _State]) -> _State:
    out = list(state)
    for weight, slope in slopes:
        out = [x + (h * weight) * k for x, k in zip(out, slope, strict=True)]
    return tuple(out)


def _rk4(state: _State, steps: int) -> tuple[_State, Tensor]:
    """The state after unit time, and the cores S on the way, shape (steps + 1, ..., r, r)."""
    h, cores = 1.0 / steps, [state[1].detach()]
    for _ in range(steps):
        k1 = _velocity(state)
        k2 = _velocity(_add(state, h, (0.5, k1)))
        k3 = _velocity(_add(state, h, (0.5, k2)))
        k4 = _velocity(_add(state, h, (1.0, k3)))
        state = _add(state, h, (1 / 6, k1), (1 / 3, k2), (1 / 3, k3), (1 / 6, k4))
        cores.append(state[1].detach())
    return state, torch.stack(torch.broadcast_tensors(*cores))


def _largest(A: Tensor) -> Tensor:
    return A.detach().abs().amax((-2, -1))


def _check_sign(cores: Tensor) -> None:
    """Raise if det S vanishes or changes sign: where U_p and V_p are 0 nothing else tells."""
    sign = torch.linalg.slogdet(cores).sign.reshape(len(cores), -1)
    lost = ((sign[1:] != sign[:-1]) | (sign[1:] == 0)).any(-1).nonzero()
    if lost.numel():
        k, steps = int(lost[0]), len(cores) - 1
        raise GeometryError(
            f"the geodesic loses rank: det S vanishes between the times {k / steps:.3g} and "
            f"{(k + 1) / steps:.3g} of 1; shorten ξ"
        )


def _is_apart(cores: Tensor) -> bool:
    """Whether no segment between two successive cores holds, or is near to, a singular matrix.

    S_k + θ (S_{k+1} - S_k) is singular for a θ in (0, 1) just if S_k⁻¹ S_{k+1} has a negative
    eigenvalue. An even number of them leaves the sign of det S as it was.
    """
    change = torch.linalg.solve_ex(cores[:-1], cores[1:])[0].cpu()
    return bool((torch.linalg.eigvals(change).real > 0).all())


def geodesic(X: Factors, xi: Factors, *, tol: float = 1e-13, max_steps: int = 4096) -> Factors:
    """Point at time 1 of the geodesic from `X` with velocity `xi`, blocks of shape (..., k, r).

    Raises
    ------
    GeometryError
        If the geodesic passes through a matrix of lower rank, or too near to one for the steps to
        agree.
    """
    dtype, r = X.S.dtype, X.S.shape[-1]
    if X.S.numel() == 0:
        return X
    X, xi = (Factors(*(b.double() for b in f)) for f in (X, xi))
    # The geodesic stays in span[U, U_p] x span[V, V_p]: integrate 2r coordinates, not m + n.
    Q_u, R_u = linalg.qr(joined(X.U, xi.U, dim=-1), rank_deficient=True)
    Q_v, R_v = linalg.qr(joined(X.V, xi.V, dim=-1), rank_deficient=True)
    start = (R_u[..., :r], X.S, R_v[..., :r], R_u[..., r:], xi.S, R_v[..., r:])
    # U_p S⁻¹ is only known to eps cond(S): no two runs agree better, however small the steps.
    rounding = torch.finfo(torch.float64).eps * linalg.condition_number(X.S.detach())
    allowed = rounding.clamp(tol, 1e-6)  # of each point of a batch by itself, as its size below
    steps, (previous, _) = 8, _rk4(start, 4)
    while steps <= max_steps:
        state, cores = _rk4(start, steps)
        # Frames have no scale; all else has that of the core, for |W(t)|² = |W + t ξ|².
        size = torch.maximum(_largest(X.S), _largest(state[1]))
        gaps = [
            _largest(a - b) / (1.0 if k in (0, 2) else size)
            for k, (a, b) in enumerate(zip(state, previous, strict=True))
        ]
        worst = torch.stack(torch.broadcast_tensors(*gaps)).amax(0)
        settled = bool((worst <= allowed).all())  # NaN is not
        if settled:
            _check_sign(cores)
        if settled and _is_apart(cores):
            U, S, V = linalg.polar(state[0]), state[1], linalg.polar(state[2])
            return Factors((Q_u @ U).to(dtype), S.to(dtype), (Q_v @ V).to(dtype))
        steps, previous = 2 * steps, state
    raise GeometryError(
        f"the geodesic did not settle within {max_steps} steps: it passes too near to a matrix of "
        f"lower rank (‖ξ‖ too large for σ_r = {float(linalg.svdvals(X.S)[..., -1].min()):.2e})"
    )
