"""What is trained in the claims: least squares by minibatches, full gradients, a network."""

from __future__ import annotations

import torch

import lrmanifold as lrm

from ..approximation.extremal import sharp_exponent, sharp_lipschitz
from ..approximation.problems import Batch, Layers, Setting, start_and_target
from ._steps import Training

BATCH_SIZE = 8
#: Steps for minibatches, and for full gradients of ½‖W - T‖², whose field has Lipschitz constant 1.
SMALL, LARGE = (0.01, 0.1, 0.3), (0.5, 1.5, 1.9)
RETRACTIONS = tuple(lrm.retractions.available())


def regression(draw: Batch, h: float, steps: int, setting: Setting, retraction: str) -> Training:
    """SGD on ½‖WA - B‖²/b over batches of b columns; the teacher is nearly low-rank."""
    W0, target = start_and_target(draw, setting.m, setting.n, setting)
    data = 8 * setting.n
    inputs = draw.normals(setting.n, data)
    outputs = target @ inputs + setting.noise * draw.normals(setting.m, data)
    order = [
        torch.randint(data, (BATCH_SIZE,), generator=draw.generator) for _ in range(steps)
    ]  # one batch a step for both trainings

    def field(k: int, W: Layers) -> Layers:
        A, B = inputs[..., order[k]], outputs[..., order[k]]
        return ((B - W[0] @ A) @ A.mT / BATCH_SIZE,)

    return Training("regression", field, (W0,), (setting.rank,), h, steps, retraction)


def attraction(draw: Batch, h: float, steps: int, setting: Setting, retraction: str) -> Training:
    """Full gradients of ½‖W - T‖², T nearly low-rank."""
    W0, target = start_and_target(draw, setting.m, setting.n, setting)
    T = target + setting.noise * draw.units(setting.m, setting.n)

    def field(k: int, W: Layers) -> Layers:
        return (T - W[0],)

    return Training("attraction", field, (W0,), (setting.rank,), h, steps, retraction)


def network(draw: Batch, h: float, steps: int, setting: Setting, retraction: str) -> Training:
    """SGD on a two-layer tanh network with a low-rank teacher: product metric, two layers."""
    m, n, data = setting.m, setting.n, 8 * setting.n
    (W1, T1), (W2, T2) = (start_and_target(draw, *k, setting) for k in ((m, n), (n, m)))
    inputs = draw.normals(n, data)
    outputs = T2 @ torch.tanh(T1 @ inputs) + setting.noise * draw.normals(n, data)
    order = [torch.randint(data, (BATCH_SIZE,), generator=draw.generator) for _ in range(steps)]

    def field(k: int, W: Layers) -> Layers:
        A, B = inputs[..., order[k]], outputs[..., order[k]]
        H = torch.tanh(W[0] @ A)
        R = (B - W[1] @ H) / BATCH_SIZE
        return ((W[1].mT @ R * (1.0 - H * H)) @ A.mT, R @ H.mT)

    return Training("network", field, (W1, W2), (setting.rank,) * 2, h, steps, retraction)


FAMILIES = {"regression": regression, "attraction": attraction, "network": network}


def training(
    seed: int,
    device: torch.device,
    *,
    family: str | None = None,
    h: float | None = None,
    steps: int | None = None,
    retraction: str | None = None,
    size: int = 8,
    **fixed: float,
) -> Training:
    """One of the families, with sizes, step and retraction drawn from the seed."""
    draw = Batch(seed, device, size)
    names = ("regression", "attraction", "network", "regression")
    family = family or names[seed % len(names)]
    m, n = draw.integer(4, 8), draw.integer(4, 7)
    drawn: dict[str, float] = {
        "m": m,
        "n": n,
        "rank": draw.integer(1, min(m, n) - 2),
        "spread": draw.log_uniform(1.0, 3.0),
        "change": draw.uniform(0.2, 0.6),
        "noise": draw.log_uniform(1e-3, 0.05),
    }
    setting = Setting(**{**drawn, **fixed})  # type: ignore[arg-type]
    chosen = draw.choose(*(LARGE if family == "attraction" else SMALL))
    name = draw.choose(*RETRACTIONS)
    h = chosen if h is None else h
    steps = (10 if h >= 0.5 else 40) if steps is None else steps
    return FAMILIES[family](draw, h, steps, setting, name if retraction is None else retraction)


def resting_twin(seed: int, device: torch.device, *, h: float = 0.1, steps: int = 12) -> Training:
    """Y rests while X moves at the speed ‖F(X) - F(W)‖: E⁺ = E + hc exactly.

    F(W) = ⟨W, u_⊥v_⊥ᵀ⟩ u vᵀ sees only what is not low-rank; see ``approximation/extremal.py``.
    """
    at = sharp_lipschitz(seed, torch.float64, device)["problem"]
    zero = torch.zeros((), dtype=torch.float64)

    def field(k: int, W: Layers) -> Layers:
        return at.force(zero, W)

    return Training("resting twin", field, at.start, (at.rank,), h, steps)


def turned_pair(
    seed: int, device: torch.device, *, h: float = 1e-3, steps: int = 400, theta: float = 1e-3
) -> Training:
    """A constant normal force ν u_⊥v_⊥ᵀ: X rests, a turned pair turns on at the rate ν/σ."""
    at = sharp_exponent(seed, torch.float64, device, theta)["problem"]
    zero = torch.zeros((), dtype=torch.float64)
    assert at.low_rank_start is not None
    U, S, V = at.low_rank_start[0]

    def field(k: int, W: Layers) -> Layers:
        return at.force(zero, W)

    return Training(
        "turned pair", field, at.start, (at.rank,), h, steps, low_rank_start=(U @ S @ V.mT,)
    )
