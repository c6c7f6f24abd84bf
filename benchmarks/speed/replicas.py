"""A CondLR step on two replicas: each makes all layers, or its share (``distribute=True``).

    python -m benchmarks.speed.replicas [--quick] [--output DIR]

Two gloo processes of one thread each on this machine. Both ways run in turn, step by step, on equal
gradients; the time is that of ``optimizer.step`` alone on the slower process.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lrmanifold as lrm

from ._run import Report, Settings, main
from ._timing import Samples

WORLD, WARMUP = 2, 3
WAYS = {"all": False, "its share": True}


def _worker(process: int, folder: str, size: int, rank: int, layers: int, steps: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(process), WORLD_SIZE=str(WORLD))
    store = f"file://{folder}/rendezvous-{rank}"
    dist.init_process_group("gloo", init_method=store, rank=process, world_size=WORLD)
    optimizers = {}
    for way, distribute in WAYS.items():
        torch.manual_seed(0)
        model = nn.Sequential(*[lrm.nn.LowRankLinear(size, size, rank) for _ in range(layers)])
        optimizers[way] = lrm.optim.CondLR(
            model.parameters(), lr=1e-3, momentum=0.5, distribute=distribute
        )
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for step in range(steps + WARMUP):
        for way, optimizer in optimizers.items():
            generator = torch.Generator().manual_seed(step)
            for p in optimizer.param_groups[0]["params"]:
                p.grad = 1e-2 * torch.randn(p.shape, generator=generator)
            dist.barrier()
            began = time.perf_counter()
            optimizer.step()
            longest = torch.tensor(time.perf_counter() - began)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            times[way].append(float(longest))
    if process == 0:
        kept = {way: values[WARMUP:] for way, values in times.items()}
        Path(folder, f"{rank}.json").write_text(json.dumps(kept), encoding="utf-8")
    dist.destroy_process_group()


def measure(settings: Settings) -> Report:
    """CondLR's step when each of two processes makes its share of the layers / makes them all."""
    if settings.device.type != "cpu" or settings.threads != 1:
        raise SystemExit("replicas: two processes of one thread each on the CPU, nothing else")
    size, layers = settings.pick(1024, 16), settings.pick(12, 2)
    cases = {f"rank {rank}": rank for rank in settings.pick((64, 128, 256), (2,))}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, rank in settings.chosen(cases).items():
            mp.spawn(_worker, (folder, size, rank, layers, settings.rounds), nprocs=WORLD)
            found = json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8"))
            samples = Samples({way: {"step": values} for way, values in found.items()})
            for way in WAYS:
                row: dict[str, Any] = {"case": name, "way": way}
                row |= {"ms": samples.time(way).median * 1e3, "seconds": samples.time(way)}
                rows.append(row | {"ratio": samples.ratio(way, "all")})
    columns = {"case": "layers", "way": "a process makes", "ms": "ms", "ratio": "/ all"}
    return Report(columns, rows, facts={"layers": layers, "size": size, "processes": WORLD})


if __name__ == "__main__":
    main("replicas", measure)
