"""What an accelerator cares about: launches a step, a CUDA graph of the step, bfloat16 autocast.

On a CPU the same code runs without a graph, and counts torch operations instead of kernels.

    python -m benchmarks.speed.accelerator [--device cuda] [--quick] [--output DIR]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from . import _peers
from ._problems import Problem, language, lenet, loss, quick_problems, vgg
from ._run import Report, Settings, main
from ._timing import Task, interleave, synchronize

NAMES = (*_peers.OURS, "dense SGD", "A Bᵀ by SGD", "geoopt, Euclidean Stiefel")
PASSES, STEP = "forward + backward", "step"


def launches(step: Callable[[], Any], device: torch.device) -> int:
    """Kernels that one step launches, by torch's profiler; on a CPU its outermost operations."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as trace:
        step()
        synchronize(device)
    events = trace.events() or []
    if device.type == "cuda":
        return sum(e.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for e in events)
    operations = [e for e in events if e.name.startswith("aten::")]
    return sum(
        e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::") for e in operations
    )


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The step as a CUDA graph, warmed up on a side stream; on a CPU the step itself.

    Raises
    ------
    RuntimeError
        If something in the step cannot be captured (it waits for the device, say).
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def passes(model: nn.Module, x: Tensor, y: Tensor, *, autocast: bool = False) -> Callable[[], None]:
    """Forward and backward pass into gradients that stay where they are, as graphs need it."""
    parameters = list(model.parameters())

    def both() -> None:
        for p in parameters:
            if p.grad is not None:
                p.grad.zero_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            value = loss(model, x, y)
        value.backward()

    return both


def tasks_of(built: _peers.Built, x: Tensor, y: Tensor) -> tuple[dict[str, Task], int, str | None]:
    """A training step plain, in bfloat16 and with a graphed step; launches; why no graph."""
    model, optimizer = built
    plain = passes(model, x, y)
    # Two steps: what happens only at the first ones must be over before launches are counted.
    for _ in range(2):
        plain()
        optimizer.step()
    plain()
    count = launches(optimizer.step, x.device)
    mixed = passes(model, x, y, autocast=True)
    tasks = {
        "float32": Task({PASSES: plain, STEP: optimizer.step}),
        "bfloat16 autocast": Task({PASSES: mixed, STEP: optimizer.step}),
    }
    plain()
    try:
        step = captured(optimizer.step, x.device)
    except RuntimeError as error:
        return tasks, count, f"no graph: {str(error).splitlines()[0][:60]}"
    return {**tasks, "graphed step": Task({PASSES: plain, STEP: step})}, count, None


def cases(device: torch.device) -> dict[str, Problem]:
    """The networks."""
    width = 768 if device.type == "cuda" else 256
    return {
        "LeNet5 b128 20%": lenet(0.2),
        "VGG16 b128 20%": vgg(0.2, 128),
        f"transformer {width} of 2048 tokens 20%": language(0.2, 2048, width=width),
    }


def measure(settings: Settings) -> Report:
    """Launches a step, times with a CUDA graph of the step and in bfloat16 autocast."""
    rows: list[dict[str, Any]] = []
    problems = quick_problems() if settings.quick else cases(settings.device)
    for case, problem in settings.chosen(problems).items():
        dense = problem.build().to(settings.device)
        start = _peers.Start.of(dense, problem.rank, exclude=problem.exclude)
        x, y = (t.to(settings.device) for t in problem.batch())
        every: dict[str, Task] = {}
        counts: dict[str, int] = {}
        for name in NAMES:
            tasks, counts[name], why = tasks_of(_peers.PEERS[name](start), x, y)
            every |= {f"{name}|{how}": task for how, task in tasks.items()}
            if why is not None:
                rows.append({"case": case, "name": name, "how": "graphed step", "note": why})
        samples = interleave(
            every, device=settings.device, rounds=settings.rounds, budget=2 * settings.budget
        )
        for key in every:
            name, how = key.split("|")
            row = {"case": case, "name": name, "how": how, "launches": counts[name]}
            row |= {"seconds": samples.time(key), "ms": samples.time(key).median * 1e3}
            row |= {"step": samples.time(key, STEP).median * 1e3}
            row |= {"step_share": samples.share(key, STEP, PASSES)}
            rows.append(row | {"to_dense": samples.ratio(key, f"dense SGD|{how}")})
    columns = {
        "case": "network",
        "name": "by",
        "how": "how",
        "ms": "training step, ms",
        "to_dense": "/ dense alike",
        "step": "step, ms",
        "step_share": "step / fwd+bwd",
        "launches": "launches a step",
        "note": "note",
    }
    return Report(columns, rows)


if __name__ == "__main__":
    main("accelerator", measure)
