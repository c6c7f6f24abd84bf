"""The spectral clip of the core: against a plain SVD clip, and how often a training step needs it.

python -m benchmarks.speed.clip [--device cuda] [--threads 1] [--quick] [--output DIR]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lrmanifold as lrm
from lrmanifold import linalg
from lrmanifold.experiments.models import mlp

from ._plot import Panel
from ._run import Report, Settings, main
from ._timing import interleave

TAU = 0.1
SIZES = ((1, 8), (1, 32), (1, 64), (1, 128), (1, 256), (48, 8), (48, 32))
STREAMS = tuple((tau, lr) for tau in (0.1, 0.5) for lr in (0.1, 0.01))


def svd_clip(S: Tensor, tau: float) -> Tensor:
    """The textbook's clip: decompose, clip, multiply."""
    U, s, Vh = torch.linalg.svd(S)
    return (U * linalg.clip_values(s, tau)[..., None, :]) @ Vh


def core(batch: int, r: int, cond: float, device: torch.device) -> Tensor:
    """Random cores with singular values spread evenly over a band of ratio `cond`."""
    lead = (batch,) if batch > 1 else ()
    P, Q = (torch.linalg.qr(torch.randn(*lead, r, r, device=device)).Q for _ in range(2))
    return (P * torch.linspace(cond, 1.0, r, device=device)) @ Q.mT


@contextlib.contextmanager
def count_clips() -> Iterator[dict[str, int]]:
    """Count the cores that the clip of a step decomposes, and those it changes.

    The others are let pass by a certificate.
    """
    counts = {"decomposed": 0, "changed": 0}
    clip, svd, eigh = linalg.spectral_clip, torch.linalg.svd, torch.linalg.eigh

    def clipping(S: Tensor, *args: Any, **options: Any) -> Tensor:
        clipped = clip(S, *args, **options)
        moved = (clipped - S).flatten(-2).norm(dim=-1) > 1e-6 * S.flatten(-2).norm(dim=-1)
        counts["changed"] += int(moved.sum())
        return clipped

    def counted(decompose: Any) -> Any:
        def decomposing(S: Tensor, *args: Any, **options: Any) -> Any:
            counts["decomposed"] += S[..., 0, 0].numel()
            return decompose(S, *args, **options)

        return decomposing

    with (
        mock.patch.object(linalg, "spectral_clip", clipping),
        mock.patch("torch.linalg.svd", counted(svd)),
        mock.patch("torch.linalg.eigh", counted(eigh)),
    ):
        yield counts


def fractions(
    tau: float, lr: float, margin: float, steps: int, device: torch.device
) -> dict[str, float]:
    """Shares of the layer-steps of a small training run that decompose the core, and change it.

    An mlp 64-256-256-10 on labels of a random network of the same kind, batch 128, momentum 0.9.
    """
    torch.manual_seed(0)
    teacher = mlp(64, 10, (128,)).to(device)
    model: nn.Module = mlp(64, 10, (256, 256)).to(device)
    lrm.factorize(model, rank=32, tau=tau, exclude="fc3")
    parameters = model.parameters()
    optimizer = lrm.optim.CondLR(parameters, lr=lr, momentum=0.9, clip_margin=margin)
    layers = sum(isinstance(m, lrm.nn.LowRankLayer) for m in model.modules())
    with count_clips() as counts:
        for _ in range(steps):
            x = torch.randn(128, 64, device=device)
            with torch.no_grad():
                labels = teacher(x).argmax(-1)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
    return {key: value / (steps * layers) for key, value in counts.items()}


def measure(settings: Settings) -> Report:
    """spectral_clip against an SVD clip; shares of layer-steps that decompose or change a core."""
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    cases = {f"{batch} of {r}x{r}": (batch, r) for batch, r in settings.pick(SIZES, ((1, 8),))}
    streams = {f"training, tau {t}, lr {lr}": (t, lr) for t, lr in STREAMS[: settings.pick(4, 1)]}
    for case, (a, b) in settings.chosen({**cases, **streams}).items():
        if case in streams:
            for name, margin in (("CondLR", 0.0), ("CondLR, clip margin ½", 0.5)):
                shares = fractions(a, b, margin, settings.pick(1000, 10), settings.device)
                rows.append({"what": case, "name": name, **shares})
            continue
        batch, r = int(a), int(b)
        for state, cond in (("outside", 2.0), ("inside", 1.0 + 0.5 * TAU)):
            S = core(batch, r, cond, settings.device)
            tasks = {
                "spectral_clip": partial(linalg.spectral_clip, S, TAU),
                "SVD clip": partial(svd_clip, S, TAU),
            }
            samples = interleave(
                tasks, device=settings.device, rounds=settings.rounds, budget=settings.budget
            )
            for name in tasks:
                seconds = samples.time(name)
                row: dict[str, Any] = {
                    "what": f"{case}, {state}",
                    "name": name,
                    "batch": batch,
                    "r": r,
                    "cond": cond,
                }
                row |= {"ms": seconds.median * 1e3, "seconds": seconds}
                rows.append(row | {"ratio": samples.ratio(name, "SVD clip")})
                if batch == 1:
                    lines.setdefault(f"{name}, {state}", []).append((r, seconds.median * 1e3))
    columns = {
        "what": "cores",
        "name": "by",
        "ms": "ms",
        "ratio": "/ SVD clip",
        "decomposed": "decomposed",
        "changed": "changed",
    }
    return Report(columns, rows, [Panel(f"one core, tau = {TAU}", "r", "ms", lines)])


if __name__ == "__main__":
    main("clip", measure)
