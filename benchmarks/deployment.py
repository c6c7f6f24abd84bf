"""Size and latency of a network for inference: dense, low-rank, folded, densified, and by ONNX.

    python -m benchmarks.deployment [--width 1024] [--layers 4] [--rank 0.1] [--batch 1 64]

One thread. Latencies are the median of repeated runs, after a warm-up; the largest difference of
outputs is to the low-rank model. ONNX rows need onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lrmanifold as lrm


def network(width: int, layers: int) -> nn.Module:
    """A perceptron of square layers."""
    parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(width, 10)).eval()


def megabytes(model: nn.Module) -> float:
    """Of its state dict on disk."""
    buffer = io.BytesIO()
    state = {k: v.detach().as_subclass(Tensor) for k, v in model.state_dict().items()}
    torch.save(state, buffer)
    return len(buffer.getvalue()) / 2**20


def milliseconds(run: Callable[[], object], seconds: float = 0.5) -> float:
    """Median time of a call."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def onnx_session(model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], float] | None:
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
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        stored = sum(file.stat().st_size for file in Path(folder).iterdir()) / 2**20
    name = session.get_inputs()[0].name
    return lambda z: torch.from_numpy(session.run(None, {name: z.numpy()})[0]), stored


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=float, default=0.1, help="share of the width")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = network(arguments.width, arguments.layers)
    low_rank = lrm.factorize(copy.deepcopy(dense), rank=arguments.rank).eval()
    models = {
        "dense (before)": dense,
        "low-rank": low_rank,
        "folded (U S), V": lrm.fold(copy.deepcopy(low_rank)),
        "densified": lrm.densify(copy.deepcopy(low_rank)),
    }
    inputs = [torch.randn(size, arguments.width) for size in arguments.batch]
    rows: list[tuple[str, float, Callable[[Tensor], Tensor]]] = []
    for name, model in models.items():
        rows.append((name, megabytes(model), model))
        exported = onnx_session(model, torch.randn(2, arguments.width))
        if exported is not None:
            rows.append((f"{name}, ONNX", exported[1], exported[0]))
    heads = [f"ms, batch {size}" for size in arguments.batch]
    print(f"{'':24} {'MB':>7} " + " ".join(f"{head:>14}" for head in heads) + "     difference")
    with torch.no_grad():
        expected = [low_rank(x) for x in inputs]
        for name, size, run in rows:
            times = [milliseconds(lambda x=x, run=run: run(x)) for x in inputs]  # type: ignore[misc]
            pairs = zip(inputs, expected, strict=True)
            gap = max(float((run(x) - y).abs().max()) for x, y in pairs)
            shown = "-" if name.startswith("dense") else f"{gap:.1e}"
            print(
                f"{name:24} {size:7.2f} " + " ".join(f"{t:14.3f}" for t in times) + f" {shown:>14}"
            )


if __name__ == "__main__":
    main()
