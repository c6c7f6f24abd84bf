"""Memory of training: parameters, gradients, optimizer state, activations; and no growth.

Activations are the storages that autograd saves for the backward pass, each counted once, without
those of parameters. Growth compares all living tensors, after a few steps and after many more (on
a GPU: what the allocator has given out).

    python -m benchmarks.speed.memory [--device cuda] [--quick] [--output DIR]
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import _peers
from ._plot import Panel
from ._problems import Problem, language, lenet, loss, quick_problems, vgg
from ._run import Report, Settings, main

NAMES = ("dense SGD", "A Bᵀ by SGD", "CondLR", "geoopt, Euclidean Stiefel")
PARTS = ("parameters", "gradients", "state", "activations")


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    sizes = {}
    for t in tensors:
        try:
            storage = t.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        except (NotImplementedError, RuntimeError, ValueError):
            continue  # sparse, functional and lazy tensors of others have no storage
    return sum(sizes.values())


def activations(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        value = loss(model, x, y)
    value.backward()
    return _bytes(saved)


def living(device: torch.device) -> int:
    """Bytes of all tensors that exist now, without those of frozen objects."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    # type() and not isinstance(), which would ask lazy modules for their class.
    return _bytes(o for o in gc.get_objects() if issubclass(type(o), Tensor))


def _state(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    entries = (v for state in optimizer.state.values() for v in state.values())
    return (v for v in entries if isinstance(v, Tensor))


def account(
    built: tuple[nn.Module, torch.optim.Optimizer], x: Tensor, y: Tensor, steps: int
) -> dict[str, Any]:
    """Bytes of each part, and the growth over `steps` steps after the first ones."""
    model, optimizer = built

    def train(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()

    gc.freeze()  # what others imported need not be walked through
    try:
        train(3)
        before = living(x.device)
        train(steps)
        growth = living(x.device) - before
    finally:
        gc.unfreeze()
    found: dict[str, Any] = {
        "parameters": _bytes(model.parameters()),
        "gradients": _bytes(p.grad for p in model.parameters() if p.grad is not None),
        "state": _bytes(_state(optimizer)),
        "activations": activations(model, x, y),
        "growth": growth,
    }
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        train(1)
        found["peak"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def cases(device: torch.device) -> dict[str, Problem]:
    """The networks."""
    width = 768 if device.type == "cuda" else 256
    return {
        "LeNet5 b128 20%": lenet(0.2),
        "LeNet5 b128 50%": lenet(0.5),
        "VGG16 b32 20%": vgg(0.2, 32),
        "VGG16 b128 20%": vgg(0.2, 128),
        "VGG16 b128 50%": vgg(0.5, 128),
        "transformer of 2048 tokens 20%": language(0.2, 2048, width=width),
    }


def measure(settings: Settings) -> Report:
    """MiB of parameters, gradients, state and activations; ratio to dense; growth in bytes."""
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    problems = quick_problems() if settings.quick else cases(settings.device)
    for case, problem in settings.chosen(problems).items():
        dense = problem.build().to(settings.device)
        start = _peers.Start.of(dense, problem.rank, exclude=problem.exclude)
        x, y = (t.to(settings.device) for t in problem.batch())
        totals: dict[str, float] = {}
        for name in NAMES:
            found = account(_peers.PEERS[name](start), x, y, settings.pick(20, 2))
            mebibytes = {k: found[k] / 2**20 for k in PARTS}
            totals[name] = sum(mebibytes.values())
            row = {"case": case, "name": name, **found, **mebibytes, "total": totals[name]}
            rows.append(row | {"ratio": totals[name] / totals["dense SGD"]})
            lines.setdefault(name, []).append((totals["dense SGD"], totals[name]))
    columns = {
        "case": "network",
        "name": "by",
        **{k: f"{k}, MiB" for k in PARTS},
        "total": "total",
        "ratio": "/ dense",
        "peak": "allocator's peak, MiB",
        "growth": "growth, bytes",
    }
    points = {k: sorted(v) for k, v in lines.items()}
    picture = Panel("memory of a training step", "dense SGD, MiB", "MiB", points)
    return Report(columns, rows, [picture])


if __name__ == "__main__":
    main("memory", measure)
