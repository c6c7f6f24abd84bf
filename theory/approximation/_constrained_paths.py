"""What theorems B and C need to know about the constrained flow, measured along it."""

from __future__ import annotations

import torch
from torch import Tensor

from lrmanifold import linalg

from ..core import Sample
from ..sampling import Draw
from ._evidence import below
from .constrained_flow import ConstrainedPath, cone, integrate, project, reach_constant
from .flows import GRID, Measured, from_the_start, inner, norm, refine
from .problems import Problem, problem

TAUS = (0.0, 0.1, 1.0)
STEP_TOLERANCE = 1e-2
SINGLE_LAYER = ("quadratic", "completion", "prescribed path")


def sample(
    seed: int, dtype: torch.dtype, device: torch.device, *, tau: float | None = None, **fixed
) -> Sample:
    """A problem whose start is about as conditioned as K_τ allows, τ and family in turn."""
    draw = Draw(seed, torch.float64, device)
    tau = TAUS[seed % len(TAUS)] if tau is None else tau
    options = {
        "families": (SINGLE_LAYER[seed // len(TAUS) % 3],),
        "m": draw.integer(5, 8),
        "n": draw.integer(4, 7),
        "rank": draw.integer(2, 3),
        "spread": (1.0 + tau) * draw.uniform(1.0, 1.2),
        "change": draw.uniform(0.1, 0.5),
        "noise": draw.log_uniform(1e-3, 0.05),
        **fixed,
    }
    return {"problem": problem(seed, device, **options), "tau": tau}  # type: ignore[arg-type]


def trapezoid(times: Tensor, y: Tensor) -> Tensor:
    """∫₀ᵗ y by the trapezoidal rule: what changes of the active set allow."""
    return torch.cat((torch.zeros_like(y[:1]), torch.cumulative_trapezoid(y, times, dim=0)))


def measure(at: Problem, tau: float, path: ConstrainedPath) -> Measured:
    """Quantities of theorems B and C, each of shape (N + 1, B), with X = Π_K(W).

    ``d`` = ‖Y-W‖, ``e`` = ‖Y-X‖, ``eps`` = ‖W-X‖, ``lam_W`` and ``lam_X`` (one-sided quotients on
    [Y, W] and [Y, X]), ``ell_eps`` = ‖F(X)-F(W)‖, ``nu`` = ‖N_Y‖, ``bend_Y`` = ‖N_Y‖/σ_r(Y),
    ``bend_X`` likewise with N_X = F(W) - P_{T_K(X)}F(W), ``speed_X`` = ‖P_{T_K(X)}F(W)‖, ``s_X``,
    ``defect`` = ‖Ẋ - P_{T_K(X)}F(W)‖, ``active`` (1 where Y is on the boundary), ``t``.
    """
    r, t = at.rank, path.times
    X = project(path.W, r, tau)
    FW, FX = (at.force(t[:, None, None, None], (Z,))[0] for Z in (path.W, X))
    gX = cone(X, FW, r, tau)
    to_W, to_X = (path.Y - path.W,), (path.Y - X,)
    d, e = norm(to_W), norm(to_X)
    quotients = (
        inner(to, (path.F - F,)) / size.square().clamp_min(1e-300)
        for to, F, size in ((to_W, FW, d), (to_X, FX, e))
    )
    lam_W, lam_X = (from_the_start(x, q) for x, q in zip((d, e), quotients, strict=True))
    # Ẋ over a step against the mean of both its ends; the last value is repeated.
    slope = (X[1:] - X[:-1]) / (t[1] - t[0])
    defect = norm((slope - 0.5 * (gX[1:] + gX[:-1]),))
    values = linalg.svdvals(path.Y)[..., :r]
    s_Y, s_X, nu = values[..., -1], linalg.svdvals(X)[..., r - 1], norm((path.N,))
    active = values[..., 0] >= (1.0 + tau) * (1.0 - 1e-9) * s_Y
    return {
        "d": d,
        "e": e,
        "eps": norm((path.W - X,)),
        "lam_W": lam_W,
        "lam_X": lam_X,
        "ell_eps": norm((FX - FW,)),
        "nu": nu,
        "s_Y": s_Y,
        "bend_Y": nu / s_Y,
        "bend_X": norm((FW - gX,)) / s_X,
        "speed_X": norm((gX,)),
        "s_X": s_X,
        "defect": torch.cat((defect, defect[-1:])),
        "active": active.to(t.dtype),
        "t": t[:, None].expand_as(d),
    }


def theorem_B(q: Measured, c: float, drift: float) -> Tensor:
    """q' = 2λq + 2c‖N_Y‖(√q + ε)²/σ_r(Y) + drift·2ε‖N_Y‖, q(0) = d(0)², by Heun; returns √q."""
    t = q["t"][:, 0]
    h, values = t[1] - t[0], [q["d"][0].square()]

    def rate(k: int, x: Tensor) -> Tensor:
        reach = 2.0 * c * q["bend_Y"][k] * (x.sqrt() + q["eps"][k]).square()
        return 2.0 * q["lam_W"][k] * x + reach + drift * 2.0 * q["eps"][k] * q["nu"][k]

    for k in range(len(t) - 1):
        x = values[-1]
        first = rate(k, x)
        values.append(x + 0.5 * h * (first + rate(k + 1, x + h * first)))
    return torch.stack(values).sqrt()


def theorem_C(q: Measured, c: float, defect: float) -> Tensor:
    """E' = (λ + c(‖N_Y‖/σ_r(Y) + ‖N_X‖/σ_r(X))) E + ℓε + defect·‖D_K‖, E(0) = e(0)."""
    t = q["t"][:, 0]
    growth = trapezoid(t, q["lam_X"] + c * (q["bend_Y"] + q["bend_X"]))
    source = q["ell_eps"] + defect * q["defect"]
    return growth.exp() * (q["e"][0] + trapezoid(t, (-growth).exp() * source))


def run(
    sample: Sample, *, drift: float = 1.0, defect: float = 1.0, reach: float = 1.0
) -> tuple[Measured, Tensor, Tensor]:
    """Measured quantities with the certificates ``B`` and ``C``; resolved problems; step errors.

    `drift`, `defect`, `reach` are factors of the terms 2ε‖N_Y‖, ‖D_K‖ and of c, for the controls.
    """
    at, tau = sample["problem"], sample["tau"]
    c = reach * reach_constant(at.rank, tau)

    def at_steps(steps: int) -> Measured:
        q = dict(measure(at, tau, integrate(at, tau, steps)))
        q["B"], q["C"] = theorem_B(q, c, drift), theorem_C(q, c, defect)
        return q

    watched = ("d", "e", "B", "C")
    q, moved = refine(at_steps, watched, tolerance=STEP_TOLERANCE, first=2 * GRID, most=16 * GRID)
    return q, below(moved[GRID // 10 :], STEP_TOLERANCE).all(0), moved
