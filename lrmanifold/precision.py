"""Dtypes: what geometry is computed in, and how far rounding may carry a stored point."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

_HALF = (torch.float16, torch.bfloat16)
#: What a low-rank weight may be stored in.
STORAGE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which geometry is computed: float32 for the half precisions, else the same."""
    return torch.float32 if dtype in _HALF else dtype


# How far from its manifold a stored point may be: rounding of storage, with room for a long run.
_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def storage_tolerance(dtype: torch.dtype) -> float:
    """Largest max |UᵀU - I| that counts as a point of the manifold in this dtype."""
    return _TOLERANCE.get(dtype, 1e-4)


def check_float64(name: str, A: Tensor) -> None:
    """Raise on a device without float64, in which factorisations and sums are refined."""
    if A.device.type == "mps":
        raise TypeError(
            f"{name} must be on a device that has float64, got {A.device}: train on cpu or cuda"
        )


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    for a in args:  # a loop: each step comes here often
        if isinstance(a, Tensor):
            return a
    return next((a for a in kwargs.values() if isinstance(a, Tensor)), None)


def without_autocast(method: F) -> F:
    """Run a function within the caller's autocast as without it, on the device of its tensors."""

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        first = _first_tensor(args, kwargs)
        kind = "cpu" if first is None else first.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return method(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def in_compute_dtype(method: F) -> F:
    """Run a manifold method on float32 copies of half-precision tensors and cast its results back.

    Points in bfloat16 are stored rounded (drift about 4e-3); sums over their products must not be,
    nor within autocast those of points in float32.
    """

    @without_autocast
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        first = _first_tensor(args, kwargs)
        dtype = torch.float32 if first is None else first.dtype
        wide = compute_dtype(dtype)
        if wide == dtype:
            return method(self, *args, **kwargs)
        args = tuple(a.to(wide) if isinstance(a, Tensor) else a for a in args)
        kwargs = {k: a.to(wide) if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        result = method(self, *args, **kwargs)
        if isinstance(result, Tensor):
            return result.to(dtype)
        return tuple(x.to(dtype) for x in result)

    return wrapped  # type: ignore[return-value]
