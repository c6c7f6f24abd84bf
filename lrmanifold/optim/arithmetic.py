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
        self._precision: Any = None

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """The step's own arithmetic."""
        self._theirs = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in self._devices
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        ]
        self._precision = _precision()
        with contextlib.ExitStack() as stack:
            for kind, _ in self._theirs:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_products_in(_FULL))
            yield

    def evaluate(self, closure: Callable[[], Any]) -> Any:
        """Call a closure with gradients, and with the caller's autocast and precision."""
        with contextlib.ExitStack() as stack:
            for kind, dtype in self._theirs:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            stack.enter_context(_products_in(self._precision))
            stack.enter_context(torch.enable_grad())
            return closure()


_MKLDNN: Any = torch.backends.mkldnn
_BACKENDS: list[Any] = [torch.backends.cuda.matmul, getattr(_MKLDNN, "matmul", None)]
_OLD = not all(hasattr(b, "fp32_precision") for b in _BACKENDS)  # torch before 2.9
#: float32 products in float32, on CUDA and on the CPU.
_FULL: Any = "highest" if _OLD else ["ieee"] * len(_BACKENDS)


def _precision() -> Any:
    """How float32 products are made now."""
    return torch.get_float32_matmul_precision() if _OLD else [b.fp32_precision for b in _BACKENDS]


def _set_precision(values: Any) -> None:
    if _OLD:
        torch.set_float32_matmul_precision(values)
        return
    for b, value in zip(_BACKENDS, values, strict=True):
        b.fp32_precision = value


@contextlib.contextmanager
def _products_in(values: Any) -> Iterator[None]:
    """Within, float32 products are made as these values say."""
    before = _precision()
    _set_precision(values)
    try:
        yield
    finally:
        _set_precision(before)
