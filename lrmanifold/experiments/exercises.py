"""What the checks of the lessons' exercises share: a right answer passes in whatever form it comes.

A check looks at results and returns a hint, or None where nothing is wrong:

>>> from lrmanifold.experiments.exercises import agree, exercise
>>> @exercise
... def check(answer):
...     if not agree(answer(3.0), 9.0):
...         return "the square of 3 is 9"
>>> check(lambda x: 2 * x)
not yet: the square of 3 is 9
>>> check(lambda x: x**2)
right
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _NotYetError(Exception):
    """Its text is the hint."""


def exercise(check: Callable[..., str | None]) -> Callable[[Callable[..., Any]], None]:
    """Make of a check that returns a hint one that takes a function and prints the verdict.

    Parameters
    ----------
    check : callable
        Takes ``answer(*arguments, shape=...)``, which calls the reader's function and returns its
        result as a float64 tensor of that shape, or as a tuple of tensors for a list of shapes.
        NumPy arrays, lists and numbers of any precision are results, too. Refused with a hint of
        its own: no result, another shape, NaN and Inf, and a function that changes its arguments.
    """

    def verdict(function: Callable[..., Any]) -> None:
        def answer(*arguments: Any, shape: Any = ()) -> Any:
            return _answer(function, arguments, shape)

        try:
            hint = check(answer)
        except _NotYetError as error:
            hint = str(error)
        print("right" if hint is None else f"not yet: {hint}")

    return verdict


def agree(got: Any, right: Any, tolerance: float = 1e-5) -> bool:
    """Whether the two are equal up to this share of the norm of the second: float32 is enough."""
    got, right = (torch.as_tensor(a).detach().double() for a in (got, right))
    return bool((got - right).norm() <= tolerance * right.norm())


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...], shape: Any) -> Any:
    given = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    result = function(*given)
    for before, after in zip(arguments, given, strict=True):
        if isinstance(before, torch.Tensor) and not torch.equal(before, after.detach()):
            raise _NotYetError("the function changes its argument in place: compute with a copy")
    if not isinstance(shape, list):
        return _tensor(result, shape, "the result")
    if not isinstance(result, tuple | list) or len(result) != len(shape):
        raise _NotYetError(f"it must return {len(shape)} results, got {_kind(result)}")
    return tuple(
        _tensor(part, size, f"result {i + 1}")
        for i, (part, size) in enumerate(zip(result, shape, strict=True))
    )


def _tensor(result: Any, shape: tuple[int, ...], name: str) -> torch.Tensor:
    if result is None:
        raise _NotYetError("the function returns None: is there a return?")
    try:
        tensor = torch.as_tensor(result).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError):
        raise _NotYetError(f"{name} must be an array or a tensor, got {_kind(result)}") from None
    if tuple(tensor.shape) != tuple(shape):
        raise _NotYetError(f"{name} must have the shape {shape}, got {tuple(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise _NotYetError(f"{name} has NaN or Inf: is something divided by zero?")
    return tensor


def _kind(result: Any) -> str:
    kind = type(result).__name__
    return f"a {kind} of {len(result)}" if isinstance(result, tuple | list) else f"a {kind}"
