"""One optimizer step on the weights of well-known networks, against peers and the machine's limit.

Every step sees a fresh gradient, from a forward and backward pass of a random batch that is not
timed. Its size makes the point move by about one percent of its smallest singular value.

    python -m benchmarks.speed.step [--device cuda] [--threads 1] [--quick] [--output DIR]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold.experiments.models import lenet5

from ..models import vgg16
from . import _peers
from ._plot import Panel
from ._run import Report, Settings, main
from ._timing import Quartiles, Shape, Task, interleave, share_of_limit, step_flops

BATCH, GRADIENT = 16, 1.0
SINGLY = "CondLR, a layer at a time"


class Bank(nn.Module):
    """Linear layers side by side, each with an input of its own; their loss is linear."""

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in sizes)

    def forward(self) -> Tensor:
        """A loss whose gradient is a fresh random matrix of norm about GRADIENT a layer."""
        device = next(self.parameters()).device
        total = torch.zeros((), device=device)
        for (m, n), layer in zip(self.sizes, self.layers, strict=True):
            x = torch.randn(BATCH, n, device=device)
            y = torch.randn(BATCH, m, device=device) * (GRADIENT / (BATCH * m * n) ** 0.5)
            total = total + (layer(x) * y).sum()
        return total


def shapes_of(model: nn.Module, share: float) -> list[Shape]:
    """Shapes (m, n, r) of the layers that ``factorize`` makes low-rank at that share."""
    model = lrm.factorize(model.to("meta"), rank=share)
    layers = [m for m in model.modules() if isinstance(m, lrm.nn.LowRankLayer)]
    return [(L.manifold.m, L.manifold.n, L.rank) for L in layers]


def _block(width: int, inner: int, rank: int) -> list[Shape]:
    sizes = [(3 * width, width), (width, width), (inner, width), (width, inner)]
    return [(m, n, rank) for m, n in sizes]


CASES: dict[str, Callable[[], list[Shape]]] = {
    "LeNet5 20 %": lambda: shapes_of(lenet5(), 0.2),
    "LeNet5 50 %": lambda: shapes_of(lenet5(), 0.5),
    "VGG16 20 %": lambda: shapes_of(vgg16(), 0.2),
    "VGG16 50 %": lambda: shapes_of(vgg16(), 0.5),
    "block 768/3072 rank 128": lambda: _block(768, 3072, 128),
    "block 4096/4096 rank 64": lambda: [(4096, 4096, 64)] * 6,
    "512x4608 rank 128": lambda: [(512, 4608, 128)],
    "4096x4096 rank 64": lambda: [(4096, 4096, 64)],
    "48 of 64x64 rank 8": lambda: [(64, 64, 8)] * 48,
}
QUICK: dict[str, Callable[[], list[Shape]]] = {"3 of 24x16 rank 4": lambda: [(24, 16, 4)] * 3}


class _Singly:
    """An optimizer a layer: what batching of equal shapes is measured against."""

    def __init__(self, model: nn.Module) -> None:
        options: dict[str, Any] = {"lr": _peers.LR, "momentum": _peers.MOMENTUM}
        self.optimizers = [lrm.optim.CondLR([p], **options) for p in model.parameters()]

    def step(self) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step()


def task(model: nn.Module, step: Callable[[], Any]) -> Task:
    """The timed `step` after an untimed forward and backward pass."""

    def prepare() -> None:
        model.zero_grad()
        model().backward()

    return Task({"step": step}, prepare)


def start_of(shapes: Sequence[Shape], device: torch.device) -> _peers.Start:
    """A bank of these shapes, dense and low-rank."""
    bank = Bank([(m, n) for m, n, _ in shapes]).to(device)
    ranks = {f"layers.{i}": r for i, (_, _, r) in enumerate(shapes)}
    return _peers.Start.of(bank, ranks, init="random")


def measure(settings: Settings) -> Report:
    """One step: time, share of the limit of the thin products, ratio to CondLR's."""
    rate = settings.gemm_rate()
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    for case, make in settings.chosen(settings.pick(CASES, QUICK)).items():
        shapes = make()
        start = start_of(shapes, settings.device)
        built, missing = _peers.build_all(start, without=(*_peers.IN_FORWARD, *settings.without))
        tasks = {name: task(model, optimizer.step) for name, (model, optimizer) in built.items()}
        if len(set(shapes)) == 1 and len(shapes) > 1:
            model, _ = _peers.ours()(start)
            tasks[SINGLY] = task(model, _Singly(model).step)
        samples = interleave(
            tasks, device=settings.device, rounds=settings.rounds, budget=settings.budget
        )
        limits = {
            "limit_6": step_flops(shapes, exact_metric=False),
            "limit_8": step_flops(shapes),
        }
        for name in tasks:
            seconds = samples.time(name)
            row = {"case": case, "name": name, "ms": seconds.median * 1e3, "seconds": seconds}
            row["ratio"] = samples.ratio(name, "CondLR")
            if name.startswith("CondLR"):
                row |= _shares(limits, rate, seconds)
            rows.append(row)
            # The time of the others has nothing to do with r.
            if name.startswith(("CondLR", "geoopt")):
                lines.setdefault(name, []).append((limits["limit_6"], seconds.median * 1e3))
        rows += [{"case": case, "name": k, "note": reason} for k, reason in missing.items()]
    columns = {
        "case": "weights",
        "name": "optimizer",
        "ms": "ms",
        "ratio": "/ CondLR",
        "limit_6": "share of 6(m+n)r²",
        "limit_8": "share of 8(m+n)r²",
        "note": "note",
    }
    lines["limit: these flops at the rate of GEMM"] = [
        (flops, flops / rate * 1e3) for flops, _ in lines["CondLR"]
    ]
    points = {k: sorted(v) for k, v in lines.items()}
    picture = Panel("one step", "flops 6(m+n)r² of all layers", "ms", points)
    return Report(columns, rows, [picture], {"gemm_rate": rate})


def _shares(limits: dict[str, float], rate: float, seconds: Quartiles) -> dict[str, float]:
    return {k: share_of_limit(flops, rate, seconds.median) for k, flops in limits.items()}


if __name__ == "__main__":
    main("step", measure)
