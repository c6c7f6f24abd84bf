"""Size and time of a trained network: dense, low-rank, folded, densified, and by ONNX.

    python -m benchmarks.speed.inference [--device cuda] [--threads 1] [--quick] [--output DIR]

ONNX rows need onnx, onnxscript and onnxruntime, and a CPU.
"""

from __future__ import annotations

import copy
import functools
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lrmanifold as lrm

from ._run import Report, Settings, main
from ._timing import interleave

LAYERS, RANK = 4, 0.1

Function = Callable[[Tensor], Tensor]


def network(width: int) -> nn.Module:
    """A perceptron of `LAYERS` square layers and a head of ten outputs."""
    parts = [part for _ in range(LAYERS) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(width, 10)).eval()


def megabytes(model: nn.Module) -> float:
    """Of its state dict on disk."""
    buffer = io.BytesIO()
    state = {k: v.detach().as_subclass(Tensor) for k, v in model.state_dict().items()}
    torch.save(state, buffer)
    return len(buffer.getvalue()) / 2**20


def onnx_session(model: nn.Module, x: Tensor, threads: int) -> tuple[Function, float] | None:
    """A function that runs the exported model, and its size; None without the packages."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        size = torch.export.Dim("batch", min=1, max=4096)
        torch.onnx.export(
            model, (x,), path, dynamo=True, dynamic_shapes=({0: size},), verbose=False
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        stored = sum(file.stat().st_size for file in Path(folder).iterdir()) / 2**20
    name = session.get_inputs()[0].name
    return lambda z: torch.from_numpy(session.run(None, {name: z.numpy()})[0]), stored


def networks(width: int, settings: Settings) -> dict[str, tuple[Function, float]]:
    """Each form of the network, ready to be called, and its megabytes."""
    dense = network(width)
    low_rank = lrm.factorize(copy.deepcopy(dense), rank=RANK).eval()
    models = {
        "dense": dense,
        "low-rank": low_rank,
        "folded": lrm.fold(copy.deepcopy(low_rank)),
        "densified": lrm.densify(copy.deepcopy(low_rank)),
    }
    found: dict[str, tuple[Function, float]] = {}
    for name, model in models.items():
        found[name] = model.to(settings.device), megabytes(model)
        if settings.device.type == "cpu":
            exported = onnx_session(model, torch.randn(2, width), settings.threads)
            if exported is not None:
                found[f"{name}, ONNX"] = exported
    return found


def measure(settings: Settings) -> Report:
    """Forward passes of a network of four square layers at rank 10 % / the dense one's."""
    width = settings.pick(1024, 64)
    forms = networks(width, settings)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for size in (1, 64):
            x = torch.randn(size, width, device=settings.device)
            expected = forms["low-rank"][0](x)
            samples = interleave(
                {name: functools.partial(run, x) for name, (run, _) in forms.items()},
                device=settings.device,
                rounds=settings.pick(301, 3),
                warmup=settings.pick(10, 1),
                budget=settings.budget,
            )
            for name, (run, stored) in forms.items():
                row: dict[str, Any] = {"case": f"batch {size}", "network": name, "mb": stored}
                row |= {"ms": samples.time(name).median * 1e3, "seconds": samples.time(name)}
                row["ratio"] = samples.ratio(name, "dense")
                if not name.startswith("dense"):  # as "densified" does not
                    row["difference"] = float((run(x) - expected).abs().max())
                rows.append(row)
    columns = {
        "case": "input",
        "network": "network",
        "mb": "MB",
        "ms": "ms",
        "ratio": "/ dense",
        "difference": "largest difference to low-rank",
    }
    return Report(columns, rows, facts={"width": width, "layers": LAYERS, "rank": RANK})


if __name__ == "__main__":
    main("inference", measure)
