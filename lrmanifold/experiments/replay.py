"""A function of tensors as a CUDA graph: small networks take longer to launch than to compute.

The first calls are made as they are, on a stream of their own; then the function is captured, and
from there on replayed on copies of what it is given. What it reads and writes beside its arguments
(weights, the optimizer's state, sums) must stay at its place, and nothing in it may wait for the
device. On the CPU, and switched off, it is the function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[..., Tensor | None]


class CaptureError(RuntimeError):
    """The function cannot be captured; what it works on may be half a step further.

    Torch's allocator may keep a broken pool: work that is not lost goes on in a new process.
    """


class Replay:
    """`function`, captured after `warm_up` calls.

    Parameters
    ----------
    function : callable (*tensors) -> Tensor or None
        Its result is overwritten by the next call.
    device : torch.device
    warm_up : int
        At least 1: caches are filled and states made in these calls.
    enabled : bool

    Attributes
    ----------
    captured : bool
    """

    def __init__(
        self, function: Function, device: torch.device, *, warm_up: int = 3, enabled: bool = True
    ) -> None:
        self.function, self.left = function, max(1, warm_up)
        self.stream = None
        if enabled and device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether calls are replayed by now."""
        return self.graph is not None

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """One call; with tensors of another shape than at the capture made as it is."""
        if self.stream is None:
            return self.function(*inputs)
        if self.graph is None:
            if self.left > 0:
                self.left -= 1
                return self._aside(self.stream, *inputs)
            self._capture(self.stream, *inputs)
        if any(x.shape != kept.shape for x, kept in zip(inputs, self.inputs, strict=True)):
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


def _free_generator(device: torch.device) -> None:
    """A broken capture keeps torch's own generator of the device: give it another state."""
    generator = torch.cuda.default_generators[device.index or 0]
    fresh = torch.Generator(device).manual_seed(generator.initial_seed())
    with contextlib.suppress(AttributeError):  # torch before 2.5
        generator.graphsafe_set_state(fresh)
