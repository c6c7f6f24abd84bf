"""Steps on several processes: sharded parameters (FSDP2), and layers shared out over the ranks.

**Sharded** parameters are DTensors, each process holding some rows of U, S and V stacked. A step
needs whole factors: one weight after the other is gathered, moved by every process (the same
numbers, so the same result to the bit), and each keeps its rows. Momentum is sharded in the same
way. Whole is only one weight at a time. What is on no manifold moves where it is.

**Shared out** (``distribute=True``): every process has all weights and, by DDP, the same gradients.
Each moves the low-rank weights that it is assigned, and sends weight and momentum to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from ..linalg import ClipMemory, all_finite, compute_dtype
from ..manifolds import FixedRank
from ..parameter import gathered, is_sharded

if TYPE_CHECKING:
    from ._base import GeometricOptimizer, Item


# -- sharded parameters


def move_sharded(optimizer: GeometricOptimizer, items: Sequence[Item]) -> None:
    """Move DTensor parameters; the processes of their mesh take part together.

    Raises
    ------
    GeometryError, FloatingPointError
        As :meth:`GeometricOptimizer.step`, on every process.
    """
    for item in items:
        if item[2] is None:
            _move_rows(optimizer, item)
        else:
            _move_gathered(optimizer, item)


def _move_rows(optimizer: GeometricOptimizer, item: Item) -> None:
    """An ordinary parameter: each process moves what it holds, unless one of them must not."""
    group, p, _, label = item
    local, grad = _local(p), _local(p.grad)
    finite = torch.tensor(float(all_finite(grad)), device=local.device)
    for dim in range(p.device_mesh.ndim):  # type: ignore[attr-defined]
        dist.all_reduce(finite, dist.ReduceOp.MIN, p.device_mesh.get_group(dim))  # type: ignore[attr-defined]
    if not finite:
        # The sum of the whole has a NaN: the same on each process, whose own rows may be fine.
        grad = torch.full_like(grad, torch.nan)
        if not grad.numel():
            _count_skipped(optimizer, group, p, label)
            return
    _move_stand_in(optimizer, item, local, grad, local_state=True)


def _count_skipped(optimizer: Any, group: dict[str, Any], p: Tensor, label: str) -> None:
    if not group.get("skip_nonfinite", True):
        raise FloatingPointError(f"the gradient of {label} holds NaN or Inf")
    optimizer._state_of(p)["skipped"] += 1


def _move_gathered(optimizer: GeometricOptimizer, item: Item) -> None:
    _, p, _, _ = item
    full, grad = gathered(p).detach().clone(), gathered(p.grad).detach()  # type: ignore[arg-type]
    _move_stand_in(optimizer, item, full, grad, local_state=False)
    _local(p).copy_(_rows(full, p))


def _move_stand_in(
    optimizer: Any, item: Item, stand_in: Tensor, grad: Tensor, *, local_state: bool
) -> None:
    """Let the optimizer move a plain tensor in the place of a DTensor, state included."""
    from ._base import _mark

    group, p, manifold, label = item
    state = dict(optimizer._state_of(p))
    for key, value in state.items():
        if is_sharded(value):
            state[key] = _local(value) if local_state else gathered(value)
    stand_in.grad = grad
    if manifold is not None and optimizer._sums.get(p) == _sum(stand_in):
        optimizer._marks[stand_in] = _mark(stand_in)  # nobody wrote to it: no need to measure
    optimizer.state[stand_in] = state
    optimizer._cores[stand_in] = optimizer._cores.setdefault(p, ClipMemory())
    try:
        optimizer._guarded_update(group, stand_in, manifold, label)
    finally:
        moved = optimizer.state.pop(stand_in)
        optimizer._marks.pop(stand_in, None)
        optimizer._cores.pop(stand_in)
    optimizer._sums[p] = _sum(stand_in)
    shape = stand_in.shape
    for key, value in moved.items():
        if isinstance(value, Tensor) and value.ndim and value.shape == shape:
            moved[key] = _like(p, value) if local_state else sharded_like(p, value)
    optimizer.state[p].clear()
    optimizer.state[p].update(moved)


def _sum(full: Tensor) -> float:
    """The same on every process, as `full` is: decisions by it are common ones."""
    return float(full.sum(dtype=torch.float64))


def _local(p: Any) -> Tensor:
    return p.to_local().detach()


def _rows(full: Tensor, p: Any) -> Tensor:
    """What this process holds of a tensor sharded like `p`; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    whole = [Replicate()] * p.device_mesh.ndim
    replicated = DTensor.from_local(full, p.device_mesh, whole, run_check=False)
    return replicated.redistribute(placements=p.placements).to_local()


def sharded_like(p: Any, full: Tensor) -> Tensor:
    """A DTensor sharded like `p` from the whole one, which every process has; nothing is sent."""
    return _like(p, _rows(full, p))


def _like(p: Any, local: Tensor) -> Tensor:
    """A DTensor sharded like `p` of which this process holds `local`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local.clone(),
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


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


def move_shared_out(
    optimizer: GeometricOptimizer, items: Sequence[Item], move: Callable[[Sequence[Item]], None]
) -> None:
    """Move each item on one rank and send the result to the others.

    Parameters
    ----------
    items : sequence
        On low-rank manifolds, the same and in the same order on every rank.
    move : callable
        Moves those that it is given.

    Raises
    ------
    RuntimeError
        Without a process group.
    FloatingPointError, GeometryError
        On every rank, if the step failed on one; weights are the same everywhere then too.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "distribute=True needs a process group: call torch.distributed.init_process_group "
            "first, or run under torchrun"
        )
    me, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        move(items)
        return
    costs = [float(p.numel() * p.shape[-1]) for _, p, _, _ in items]
    owners = assign(costs, ranks)
    counted = {
        item[1]: [optimizer._state_of(item[1])[key].clone() for key in _COUNTERS]
        for item, owner in zip(items, owners, strict=True)
        if owner == me
    }
    error: Exception | None = None
    try:
        move([item for item, owner in zip(items, owners, strict=True) if owner == me])
    except (FloatingPointError, RuntimeError) as caught:
        error = caught  # the others wait for what this rank sends
    failed: list[int] = []
    for kind in sorted({(p.dtype, str(p.device)) for _, p, _, _ in items}, key=str):
        chosen = [
            (item, owner)
            for item, owner in zip(items, owners, strict=True)
            if (item[1].dtype, str(item[1].device)) == kind
        ]
        failed += _exchange(optimizer, chosen, me, ranks, error, counted)
    if failed:
        # All of this happens after a failure only: who failed tells the others why.
        first = min(failed)
        words = [(type(error).__name__, str(error)) if first == me else None]
        dist.broadcast_object_list(words, first)
        if error is not None:
            raise error
        name, text = words[0] or ("", "")
        from ..errors import GeometryError

        error_type = GeometryError if name == "GeometryError" else FloatingPointError
        raise error_type(f"on rank {first}: {text}")


_COUNTERS = ("step", "skipped")
# Kept in a compute dtype whatever the parameter's.
WIDE_STATE = ("exp_avg_sq",)


def _exchange(
    optimizer: Any,
    chosen: Sequence[tuple[Item, int]],
    me: int,
    ranks: int,
    error: Exception | None,
    counted: dict[Tensor, list[Tensor]],
) -> list[int]:
    """Send and receive weights and momenta, one message a rank; returns the ranks that failed."""
    like = chosen[0][0][1]
    messages, pending = [], []
    for rank in range(ranks):
        mine = [item for item, owner in chosen if owner == rank]
        size = 1 + sum(_length(optimizer, item) for item in mine)
        message = torch.zeros(size, dtype=compute_dtype(like.dtype), device=like.device)
        if rank == me:
            message[0] = float(error is not None)
            at = 1
            for item in mine:
                at = _write(optimizer, item, message, at, counted[item[1]])
        messages.append(message)
        pending.append(dist.broadcast(message, rank, async_op=True))
    for work in pending:
        work.wait()
    for rank, message in enumerate(messages):
        at = 1
        for item, owner in chosen:
            if owner == rank != me:
                at = _read(optimizer, item, message, at)
    if like.device.type != "cpu":
        return []  # there no step fails: it is skipped
    return [rank for rank, message in enumerate(messages) if message[0] != 0]


def _length(optimizer: Any, item: Item) -> int:
    """Of the part of a message that tells of `item`: counters, flags, the weight, its state."""
    shapes = optimizer._shared_state(item)
    return len(_COUNTERS) + len(shapes) + item[1].numel() + sum(map(_numel, shapes.values()))


def _numel(shape: tuple[int, ...] | None) -> int:
    return 0 if shape is None else int(torch.Size(shape).numel())


def _write(optimizer: Any, item: Item, message: Tensor, at: int, counted: Sequence[Tensor]) -> int:
    _, p, _, _ = item
    state, shapes = optimizer._state_of(p), optimizer._shared_state(item)
    numbers = [state[key] - before for key, before in zip(_COUNTERS, counted, strict=True)]
    for number in [*numbers, *(float(key in state) for key in shapes)]:
        message[at] = number
        at += 1
    message[at : at + p.numel()] = p.detach().reshape(-1)
    at += p.numel()
    for key, shape in shapes.items():
        if shape is not None and key in state:
            message[at : at + _numel(shape)] = state[key].reshape(-1)
        at += _numel(shape)
    return at


def _read(optimizer: Any, item: Item, message: Tensor, at: int) -> int:
    from ._base import _mark

    _, p, _, _ = item
    state, shapes = optimizer._state_of(p), optimizer._shared_state(item)
    for key in _COUNTERS:
        state[key] += message[at].to(torch.int64)
        at += 1
    there = [True] * len(shapes)
    if message.device.type == "cpu":
        there = [bool(x) for x in message[at : at + len(shapes)].tolist()]
    at += len(shapes)
    p.detach().copy_(message[at : at + p.numel()].view(p.shape))
    at += p.numel()
    for (key, shape), exists in zip(shapes.items(), there, strict=True):
        if shape is None or not exists:
            state.pop(key, None)
        else:
            entry = message[at : at + _numel(shape)].view(shape).clone()
            state[key] = entry if key in WIDE_STATE else entry.to(p.dtype)
        at += _numel(shape)
    optimizer._marks[p] = _mark(p)
    return at


def may_be_shared_out(item: Item) -> bool:
    """Whether an item's step is worth sending: low-rank weights, not biases."""
    return isinstance(item[2], FixedRank)
