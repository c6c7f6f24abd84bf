"""The arithmetic of a step: no autocast, no TF32, no bfloat16 products in the place of float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


class PlainArithmetic:
    """Within :meth:`plain`, products are made in the dtype of their factors.

    Bases that are multiplied in TF32 or bfloat16 drift by 1e-3 in one step. The user's own settings
    come back at the end, and in between for closures.

    Parameters
    ----------
    devices : iterable of str
        Kinds of device that the parameters are on.
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self._devices = sorted(set(devices))
        self._theirs: list[tuple[str, torch.dtype]] = []

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """The step's own arithmetic."""
        self._theirs = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in self._devices
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ]
        with contextlib.ExitStack() as stack:
            for kind, _ in self._theirs:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_full_precision())
            yield

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Call a closure with gradients, and with the caller's autocast."""
        with contextlib.ExitStack() as stack:
            for kind, dtype in self._theirs:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            stack.enter_context(torch.enable_grad())
            return closure()


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products in float32, on CUDA and on the CPU."""
    mkldnn: Any = torch.backends.mkldnn
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(mkldnn, "matmul", None)]
    if not all(hasattr(b, "fp32_precision") for b in backends):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    values = [b.fp32_precision for b in backends]
    for b in backends:
        b.fp32_precision = "ieee"
    try:
        yield
    finally:
        for b, value in zip(backends, values, strict=True):
            b.fp32_precision = value
