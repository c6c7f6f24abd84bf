"""What the processes of the distributed tests run, and the start of them."""

from __future__ import annotations

import copy
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import lrmanifold as lrm

STEPS = 200


def launch(worker, world: int, folder: Path, *args) -> None:
    """Run ``worker(rank, world, folder, *args)`` in `world` gloo processes; raise if one fails."""
    port_file = folder / f"rendezvous-{worker.__name__}-{world}"
    port_file.unlink(missing_ok=True)
    context = mp.get_context("fork")  # torch is there at once; no thread runs yet
    processes = [
        context.Process(target=_run, args=(worker, rank, world, folder, str(port_file), args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    errors = "".join(p.read_text() for p in sorted(folder.glob("error-*")))
    assert not alive, f"{len(alive)} of {world} processes hang\n{errors}"
    assert all(process.exitcode == 0 for process in processes), errors


def _run(worker, rank, world, folder, port_file, args) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{port_file}", rank=rank, world_size=world
        )
        worker(rank, world, folder, *args)
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


def network(seed: int = 0, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    dense = nn.Sequential(
        nn.Conv2d(2, 8, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, 21),
        nn.Tanh(),
        nn.Linear(21, 21),
        nn.Tanh(),
        nn.Linear(21, 3),
    ).to(dtype)
    return lrm.factorize(dense, rank=3, tau=0.1, exclude="7", keep_larger=True)


def optimizer_for(model: nn.Module, kind: str = "CondLR", **options):
    if kind == "CondLRAdam":
        return lrm.optim.CondLRAdam(model.parameters(), lr=0.01, **options)
    if kind == "CondLRMuon":
        return lrm.optim.CondLRMuon(model.parameters(), lr=0.01, **options)
    return lrm.optim.CondLR(model.parameters(), lr=0.05, momentum=0.5, **options)


def batch(step: int, dtype=torch.float64):
    """The whole batch of a step, of 16; every process makes the same and takes its part."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 2, 4, 4, dtype=dtype, generator=generator)
    return x, (x.sum((1, 2, 3)) > 0).long()


def train(model, optimizer, steps, rank=0, world=1, *, first=0, spoil=None) -> None:
    for step in range(first, first + steps):
        x, y = (part.chunk(world)[rank] for part in batch(step))
        if step == spoil:
            x = x * torch.nan
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole plain tensors by the names of the bare model."""
    state = {}
    for name, p in model.state_dict().items():
        value = p.full_tensor() if hasattr(p, "full_tensor") else p
        state[name.removeprefix("module.")] = value.detach().as_subclass(torch.Tensor).clone()
    return state


def plain_state(optimizer) -> list[dict[str, torch.Tensor]]:
    """State of every parameter, whole, in order."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            found.append(
                {
                    key: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone()
                    for key, v in state.items()
                }
            )
    return found


def single(kind="CondLR", steps=STEPS, spoil=None, **options):
    """The run in one process that the others must equal."""
    model = network()
    optimizer = optimizer_for(model, kind, **options)
    train(model, optimizer, steps, spoil=spoil)
    return model, optimizer


def replica(rank: int):
    """A DDP model; the ranks start differently, DDP makes them equal."""
    return nn.parallel.DistributedDataParallel(copy.deepcopy(network(seed=0 if rank == 0 else 99)))


def save(folder: Path, rank: int, model, optimizer) -> None:
    torch.save([weights(model), plain_state(optimizer)], folder / f"rank-{rank}.pt")
