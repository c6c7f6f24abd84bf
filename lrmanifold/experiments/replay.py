"""A training step as a CUDA graph: small networks take longer to launch than to compute.

A captured step repeats the kernels of one call, on the memory of that call. So

- nothing in it may wait for the device (``.item()``, ``float(loss)``, a mask, most decompositions):
  that is a :class:`CaptureError`;
- **what is no tensor on the device stays as it was at the capture**: Python's numbers, a branch,
  ``model.train()``. Rates must be tensors: build the optimizer with ``capturable=True``, and
  schedulers write into them. What else changes from step to step is given as an argument;
- weights, gradients and the optimizer's state must stay at their place: load checkpoints, move the
  model and add groups before the first call;
- the host sees nothing of it. Skipped steps are counted (``optimizer.skipped_steps``), not warned
  of, and dropout draws anew each time.

A whole loop is in :doc:`/in-practice`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., Tensor | None]


class CaptureError(RuntimeError):
    """The function cannot be captured: something in it waits for the device, as the cause says.

    What it works on may be half a step further, torch's random numbers of the device start again
    from their seed, and its allocator may keep a broken pool: go on in a new process, from a
    checkpoint.
    """


class Replay:
    """`function` on CUDA: made as it is `warm_up` times, then captured, from there on replayed.

    Call it in place of the function. On the CPU, and switched off, it is the function. Calls with
    other shapes or dtypes than at the capture (a last, smaller batch) are made as they are.

    Parameters
    ----------
    function : callable (*tensors) -> Tensor or None
        Makes one step; see above for what it may do. All it is given are tensors on the device,
        which are copied, so the caller may overwrite them. **The next call overwrites what it
        returns**: add it up, or clone it.
    device : torch.device or str
        Of the model.
    warm_up : int
        At least 1: caches are filled and the optimizer's state is made in these calls.
    enabled : bool
        False: never captured.

    Raises
    ------
    CaptureError
        By the first call after `warm_up`, if the function cannot be captured.

    Examples
    --------
    >>> replay = Replay(step, device)  # def step(x, y): ... optimizer.step(); return loss.detach()
    >>> for x, y in batches:
    ...     total += replay(x, y)
    ...     schedule.step()
    """

    def __init__(
        self,
        function: Function,
        device: torch.device | str,
        *,
        warm_up: int = 3,
        enabled: bool = True,
    ) -> None:
        self.function, self.left = function, max(1, warm_up)
        self.stream = None
        device = torch.device(device)
        if enabled and device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether calls are replayed by now; never on the CPU."""
        return self.graph is not None

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """One step; its result, valid until the next one."""
        if self.stream is None:
            return self.function(*inputs)
        if self.graph is None:
            if self.left > 0:
                self.left -= 1
                return self._aside(self.stream, *inputs)
            self._capture(self.stream, *inputs)
        pairs = zip(inputs, self.inputs, strict=True)
        if any((x.shape, x.dtype) != (kept.shape, kept.dtype) for x, kept in pairs):
            return self._aside(self.stream, *inputs)
        assert self.graph is not None
        for kept, x in zip(self.inputs, inputs, strict=True):
            kept.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.output

    def _aside(self, stream: torch.cuda.Stream, *inputs: Tensor) -> Tensor | None:
        """As it is, on the stream of the capture: what belongs to a stream is there by then."""
        current = torch.cuda.current_stream(stream.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            output = self.function(*inputs)
        current.wait_stream(stream)
        return output

    def _capture(self, stream: torch.cuda.Stream, *inputs: Tensor) -> None:
        self.inputs = [x.clone() for x in inputs]
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(stream.device)
        try:
            # waits for the device at both ends; other threads may go on meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.output = self.function(*self.inputs)
        except Exception as error:
            torch.cuda.set_stream(before)
            _free_generator(stream.device)
            raise CaptureError(f"no CUDA graph could be captured: {error}") from error
        self.graph = graph


def check_rates(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Refuse rates that a captured step would keep as they were at the capture."""
    for group in optimizer.param_groups:
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device.type != device.type:
            raise ValueError(
                f"replay needs rates that are tensors on {device.type}, which schedulers write "
                f"into, got lr = {lr!r}: build the optimizer with capturable=True"
            )


def _free_generator(device: torch.device) -> None:
    """A broken capture keeps torch's own generator of the device: give it another state."""
    generator = torch.cuda.default_generators[device.index or 0]
    fresh = torch.Generator(device).manual_seed(generator.initial_seed())
    generator.graphsafe_set_state(fresh)
