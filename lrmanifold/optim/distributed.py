"""Steps on several processes: around the engine, knowing no optimizer.

**Sharded** parameters (FSDP2) are DTensors, each process holding some rows of U, S and V stacked. A
step needs whole factors: one weight after the other is gathered with its state, moved by every
process (the same numbers, so the same result to the bit), and each keeps its rows. What is on no
manifold moves where it is.

**Shared out** (``distribute=True``): every process has all weights and, by DDP, the same gradients.
Each moves the low-rank weights that it is assigned, and sends weight and state to the others. That
the processes mean the same weights is compared in every step (one number each), that the weights
are equal at the first step and every 100 (one number a weight).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import GeometryError
from ..linalg import all_finite
from ..manifolds import FixedRank
from ..parameter import gathered, is_sharded, local_part, rows_of, sharded_from_local, sharded_like
from ..precision import compute_dtype
from .engine import Engine
from .geometry import GeometryMemory, content_mark
from .items import Item

_COUNTERS = ("step", "skipped")
# Steps between two comparisons of the weights of all ranks.
_COMPARE_EVERY = 100


# -- sharded parameters


def move_sharded(engine: Engine, memory: GeometryMemory, items: Sequence[Item]) -> None:
    """Move DTensor parameters; the processes of their mesh take part together.

    One after the other: a step that cannot be made leaves the weights before it moved.

    Raises
    ------
    GeometryError, FloatingPointError
        On every process.
    """
    for item in items:
        if item.manifold is None:
            _move_rows(engine, item)
        else:
            _move_gathered(engine, memory, item)


def _move_rows(engine: Engine, item: Item) -> None:
    """An ordinary parameter: each process moves what it holds, unless one of them must not."""
    p: Any = item.key
    point, grad = local_part(p), local_part(item.grad)
    if not _everywhere(p, all_finite(grad)):
        if not item.group.get("skip_nonfinite", True):
            raise FloatingPointError(f"the gradient of {item.label} holds NaN or Inf")
        item.state["skipped"] += 1
        return
    state = {k: local_part(v) if is_sharded(v) else v for k, v in item.state.items()}
    here = Item(item.group, p, point, grad, None, item.label, state)
    error: FloatingPointError | None = None
    commits: list[Callable[[], Any]] = []
    try:
        commits = engine.compute([here])
    except FloatingPointError as caught:
        error = caught
    if not _everywhere(p, error is None):
        raise error or FloatingPointError(f"the step of {item.label} cannot be made elsewhere")
    for commit in commits:
        commit()
    _keep(item, state, point.shape, lambda value: sharded_from_local(p, value))


def _everywhere(p: Any, fine: bool) -> bool:
    """Whether something holds on every process of the mesh of `p`."""
    flag = torch.tensor(float(fine), device=local_part(p).device)
    for dim in range(p.device_mesh.ndim):
        dist.all_reduce(flag, dist.ReduceOp.MIN, p.device_mesh.get_group(dim))
    return bool(flag)


def _move_gathered(engine: Engine, memory: GeometryMemory, item: Item) -> None:
    p: Any = item.key
    full, grad = gathered(p).detach().clone(), gathered(item.grad).detach()
    state = {k: gathered(v) if is_sharded(v) else v for k, v in item.state.items()}
    assert item.manifold is not None
    if memory.marks.get(p) != content_mark(full):  # else nobody wrote to it since
        memory.ensure_on_manifold(p, full, item.manifold, 0, item.label)
    engine.move([Item(item.group, p, full, grad, item.manifold, item.label, state)])
    memory.marks[p] = content_mark(full)
    local_part(p).copy_(rows_of(p, full))
    _keep(item, state, full.shape, lambda value: sharded_like(p, value))


def _keep(item: Item, state: dict[str, Any], shape: Any, shard: Callable[[Tensor], Tensor]) -> None:
    """Put a moved state back, entries of the parameter's shape sharded like it."""
    for key, value in state.items():
        whole = isinstance(value, Tensor) and value.ndim and value.shape == shape
        item.state[key] = shard(value) if whole and key not in _COUNTERS else value
    for key in set(item.state) - set(state):
        del item.state[key]


# -- layers shared out over the ranks


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """A rank for each cost, the loads nearly equal: the largest first, to who has least.

    Parameters
    ----------
    costs : sequence of float
    ranks : int
        Number of processes.

    Returns
    -------
    list of int
        In 0..ranks - 1; the same on every process. No load exceeds the mean by more than the
        largest cost.
    """
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(ranks), key=lambda k: (loads[k], k))
        loads[owners[i]] += costs[i]
    return owners


def move_shared_out(engine: Engine, items: Sequence[Item], ensure: Callable[[Item], None]) -> None:
    """Move each low-rank item on one rank and send the result to the others.

    Parameters
    ----------
    items : sequence
        The same and in the same order on every rank.
    ensure : callable
        Raises GeometryError for an item that is off its manifold.

    Raises
    ------
    RuntimeError
        Without a process group, or where ranks mean other weights or have other values in them.
    FloatingPointError, GeometryError
        On every rank, if the step failed on one; nothing has moved then.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "distribute=True needs a process group: call torch.distributed.init_process_group "
            "first, or run under torchrun"
        )
    me = dist.get_rank()
    shared = [item for item in items if isinstance(item.manifold, FixedRank)]
    _compare(items, shared)
    owners = assign(
        [float(x.point.numel() * x.point.shape[-1]) for x in shared], dist.get_world_size()
    )
    others = {id(x) for x, owner in zip(shared, owners, strict=True) if owner != me}
    mine = [item for item in items if id(item) not in others]
    before = {id(x): [x.state[k].clone() for k in _COUNTERS] for x in mine}
    error: Exception | None = None
    commits: list[Callable[[], Any]] = []
    try:
        for item in items:
            ensure(item)
        commits = engine.compute(mine)
    except (FloatingPointError, GeometryError) as caught:
        error = caught
    _raise_together(error, items)
    for commit in commits:
        commit()
    kinds = [f"{x.point.dtype} {x.point.device}" for x in shared]
    for kind in sorted(set(kinds)):
        triples = zip(shared, owners, kinds, strict=True)
        _exchange(engine, [(x, owner) for x, owner, other in triples if other == kind], before)


def _compare(items: Sequence[Item], shared: Sequence[Item]) -> None:
    """Raise unless all ranks move the same weights, and now and then unless these are equal."""
    words = [(str(x.label), tuple(x.point.shape), str(x.point.dtype)) for x in items]
    digest = hashlib.sha256(repr(words).encode()).digest()
    look = any(int(x.state["step"] + x.state["skipped"]) % _COMPARE_EVERY == 0 for x in shared)
    values = [float(int.from_bytes(digest[:6], "big")), float(look)]
    table = _all_ranks(values, items)
    if any(row[0] != table[0][0] for row in table):
        raise RuntimeError(
            "distribute=True needs gradients for the same parameters on every rank, got other sets "
            f"on some ranks; this rank has {[w[0] for w in words]}"
        )
    if not any(row[1] for row in table):
        return
    sums = [float(x.point.sum(dtype=torch.float64)) for x in shared]
    for row in _all_ranks(sums, items):
        for value, other, item in zip(sums, row, shared, strict=True):
            if value != other:
                raise RuntimeError(
                    f"distribute=True needs the same weights on every rank, got others in "
                    f"{item.label}: start from one seed or one file, or wrap the model in "
                    "DistributedDataParallel"
                )


def _all_ranks(values: Sequence[float], items: Sequence[Item]) -> list[list[float]]:
    on_device = dist.get_backend() == "nccl" and items
    device = items[0].point.device if on_device else "cpu"
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    table = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(table, mine)
    return [row.tolist() for row in table]


def _raise_together(error: Exception | None, items: Sequence[Item]) -> None:
    """Raise on every rank what failed on one."""
    failed = [i for i, (flag,) in enumerate(_all_ranks([float(error is not None)], items)) if flag]
    if not failed:
        return
    # All of this happens after a failure only: who failed tells the others why.
    words = [(type(error).__name__, str(error)) if failed[0] == dist.get_rank() else None]
    dist.broadcast_object_list(words, failed[0])
    if error is not None:
        raise error
    name, text = words[0] or ("", "")
    kind = GeometryError if name == "GeometryError" else FloatingPointError
    raise kind(f"on rank {failed[0]}: {text}")


def _exchange(
    engine: Engine, chosen: Sequence[tuple[Item, int]], before: dict[int, list[Tensor]]
) -> None:
    """Send and receive weights and states, one message a rank."""
    me, point = dist.get_rank(), chosen[0][0].point
    like = point.new_empty(0, dtype=compute_dtype(point.dtype))
    parcels, pending = [], []
    for rank in range(dist.get_world_size()):
        items = [item for item, owner in chosen if owner == rank]
        parts = [part for item in items for part in _parts(engine, item, before.get(id(item)))]
        message = torch.cat([like, *(part.reshape(-1).to(like) for part in parts)])
        parcels.append((items, message, [part.numel() for part in parts]))
        pending.append(dist.broadcast(message, rank, async_op=True))
    for work in pending:
        work.wait()
    for rank, (items, message, sizes) in enumerate(parcels):
        if rank != me:
            parts = iter(message.split(sizes))
            for item in items:
                _read(engine, item, parts)


def _parts(engine: Engine, item: Item, before: list[Tensor] | None) -> list[Tensor]:
    """What the step added to the counters, whether there is a state, the weight, the state."""
    counts = [item.state[k] for k in _COUNTERS]
    names = engine.rule.names(item.group, item.manifold)
    return [
        *(x - y for x, y in zip(counts, before or counts, strict=True)),
        torch.tensor(float(all(k in item.state for k in names))),
        item.point,
        *(item.remembered(k, engine.rule) for k in names),
    ]


def _read(engine: Engine, item: Item, parts: Iterator[Tensor]) -> None:
    names = engine.rule.names(item.group, item.manifold)
    steps, skipped, flag = (next(parts) for _ in range(3))
    for key, count in zip(_COUNTERS, (steps, skipped), strict=True):
        item.state[key] += count[0].to(torch.int64)
    if steps.device.type != "cpu" or bool(steps):
        engine.forget(item, names)
    item.point.copy_(next(parts).view(item.point.shape))
    # On an accelerator the state is always there, and nobody waits for the flag.
    there = flag.device.type != "cpu" or bool(flag)
    for name in names:
        value, old = next(parts), item.remembered(name, engine.rule)
        if there:
            item.state[name] = value.view(old.shape).to(old.dtype, copy=True)
