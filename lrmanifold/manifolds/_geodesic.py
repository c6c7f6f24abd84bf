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


def _moved(state: _State, h: float, slope: _State) -> _State:
    return tuple(x + h * k for x, k in zip(state, slope, strict=True))


def _midpoint(state: _State, steps: int) -> tuple[_State, Tensor]:
    """Gragg's midpoint rule: the state after unit time and the cores S on the way, shape
    (steps + 1, ..., r, r). With even `steps` the error has only even powers of 1 / steps (Hairer,
    Nørsett, Wanner: Solving Ordinary Differential Equations I, II.9)."""
    h, before = 1.0 / steps, state
    state = _moved(state, h, _velocity(state))
    cores = [before[1].detach(), state[1].detach()]
    for _ in range(steps - 1):
        before, state = state, _moved(before, 2 * h, _velocity(state))
        cores.append(state[1].detach())
    return state, torch.stack(torch.broadcast_tensors(*cores))


def _extrapolated(row: list[_State], new: _State) -> list[_State]:
    """The next row of Romberg's table: `new`, of half the step, and its extrapolations to 0."""
    out = [new]
    for k, coarse in enumerate(row, 1):
        fine = out[-1]
        out.append(tuple(x + (x - y) / (4.0**k - 1) for x, y in zip(fine, coarse, strict=True)))
    return out


def _largest(A: Tensor) -> Tensor:
    return A.detach().abs().amax((-2, -1))


def _gap(state: _State, other: _State, core: Tensor) -> Tensor:
    """Largest difference of two states of each point of a batch, but for frames relative."""
    # Frames have no scale; all else has that of the core, for |W(t)|² = |W + t ξ|².
    size = torch.maximum(_largest(core), _largest(state[1]))
    gaps = [
        _largest(a - b) / (1.0 if k in (0, 2) else size)
        for k, (a, b) in enumerate(zip(state, other, strict=True))
    ]
    return torch.stack(torch.broadcast_tensors(*gaps)).amax(0)


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
    steps, row = 4, list[_State]()
    while steps <= max_steps:
        coarse, (new, cores) = row, _midpoint(start, steps)
        # Steps that are far too long overflow, and their NaN would stay in the table.
        sound = all(bool(x.isfinite().all()) for x in new)
        row = _extrapolated(coarse, new) if sound else []
        if sound and coarse and bool((_gap(row[-1], coarse[-1], X.S) <= allowed).all()):
            _check_sign(cores)
            if _is_apart(cores):
                U, S, V = linalg.polar(row[-1][0]), row[-1][1], linalg.polar(row[-1][2])
                return Factors((Q_u @ U).to(dtype), S.to(dtype), (Q_v @ V).to(dtype))
        steps *= 2
    raise GeometryError(
        f"the geodesic did not settle within {max_steps} steps: it passes too near to a matrix of "
        f"lower rank (‖ξ‖ too large for σ_r = {float(linalg.svdvals(X.S)[..., -1].min()):.2e})"
    )
