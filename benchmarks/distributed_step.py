"""Time of a CondLR step on replicas: every rank all layers, or each its share (distribute=True).

    python -m benchmarks.distributed_step [--ranks 1 2] [--size 1024] [--rank 64] [--layers 12]

gloo processes of one thread each on this machine; the time is that of ``optimizer.step`` alone, the
median over steps of the slowest rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lrmanifold as lrm


def _worker(rank: int, world: int, folder: str, distribute: bool, sizes: tuple[int, ...]) -> None:
    size, layer_rank, layers, steps = sizes
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    store = f"file://{folder}/rendezvous-{world}-{distribute}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.manual_seed(0)
    model = nn.Sequential(*[lrm.nn.LowRankLinear(size, size, layer_rank) for _ in range(layers)])
    optimizer = lrm.optim.CondLR(model.parameters(), lr=1e-3, momentum=0.5, distribute=distribute)
    times = []
    for step in range(steps + 3):
        for p in model.parameters():
            generator = torch.Generator().manual_seed(step)
            p.grad = 1e-2 * torch.randn(p.shape, generator=generator)
        dist.barrier()
        began = time.perf_counter()
        optimizer.step()
        longest = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        times.append(float(longest))
    if rank == 0:
        Path(folder, f"{world}-{distribute}").write_text(repr(statistics.median(times[3:])))
    dist.destroy_process_group()


def main() -> None:
    """Print a row for each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    sizes = (arguments.size, arguments.rank, arguments.layers, arguments.steps)
    print(f"{arguments.layers} layers {arguments.size} x {arguments.size}, rank {arguments.rank}")
    print(f"{'ranks':>5} {'every rank all, ms':>20} {'distribute=True, ms':>20}")
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.ranks:
            for distribute in (False, True):
                mp.spawn(_worker, (world, folder, distribute, sizes), nprocs=world)
            found = [
                1e3 * float(Path(folder, f"{world}-{distribute}").read_text())
                for distribute in (False, True)
            ]
            print(f"{world:>5} {found[0]:>20.2f} {found[1]:>20.2f}", flush=True)


if __name__ == "__main__":
    main()
