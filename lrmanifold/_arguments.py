"""Checks of arguments: TypeError for a wrong type, ValueError for a wrong value.

Every message names the argument, says what would be right, and shows what was given. Each function
returns the value in Python's own type, so that numpy's scalars work wherever numbers do.
"""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")
Number = float | int


def shown(value: Any) -> str:
    """A value in a message: short, and for large objects their kind only."""
    if isinstance(value, Tensor):
        kind = "a parameter" if isinstance(value, nn.Parameter) else "a tensor"
        if value.ndim or value.device.type != "cpu":
            return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
        return f"{kind} with value {value.item()}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, nn.Module):
        return f"a module of class {type(value).__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    try:
        return reprlib.repr(value)
    except Exception:  # somebody's own __repr__
        return f"an object of class {type(value).__name__}"


def check_number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
    infinite: bool = False,
    hint: str = "",
) -> float:
    """`value` as a float: a real number, no bool, of Python or numpy.

    Parameters
    ----------
    name : str
        Of the argument, for the message.
    low, high : float, optional
        The range, ends included unless `open_low`, `open_high`.
    infinite : bool
        Allow ±inf. NaN is never allowed.
    hint : str
        Ends the message: why, or what else to do.
    """
    wanted = f"a {'' if infinite else 'finite '}number{_range(low, high, open_low, open_high)}"
    if not _is_real(value):
        raise TypeError(_message(name, wanted, value, hint))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (
        not math.isnan(number)
        and (infinite or math.isfinite(number))
        and _inside(number, low, high, open_low, open_high)
    ):
        raise ValueError(_message(name, wanted, value, hint))
    return number


def check_integer(
    name: str, value: Any, *, low: int | None = None, high: int | None = None, hint: str = ""
) -> int:
    """`value` as an int: an integer, no bool and no float, of Python or numpy."""
    wanted = f"an integer{_range(low, high, False, False, integer=True)}"
    if not isinstance(value, numbers.Integral) or isinstance(value, (bool, np.bool_)):
        raise TypeError(_message(name, wanted, value, hint))
    number = int(value)
    if not _inside(number, low, high, False, False):
        raise ValueError(_message(name, wanted, value, hint))
    return number


def check_rate(
    name: str,
    value: Any,
    *,
    low: float | None = 0.0,
    high: float | None = None,
    hint: str = "",
) -> float | Tensor:
    """A number as in :func:`check_number`, or a tensor without dimensions, returned itself.

    A tensor on an accelerator is taken as it is: reading it would make the host wait.
    """
    if not isinstance(value, Tensor):
        return check_number(name, value, low=low, high=high, hint=hint)
    wanted = f"a finite number{_range(low, high, False, False)} or a tensor of one, of shape ()"
    real = not (value.is_complex() or value.dtype == torch.bool)
    if not real:
        raise TypeError(_message(name, wanted, value, hint))
    if value.ndim:
        raise ValueError(_message(name, wanted, value, hint))
    if value.device.type == "cpu":
        number = float(value.detach())
        if not (math.isfinite(number) and _inside(number, low, high, False, False)):
            raise ValueError(_message(name, wanted, value, hint))
    return value


def check_numbers(
    name: str,
    value: Any,
    length: int,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> tuple[float, ...]:
    """A tuple or list of `length` numbers, each as in :func:`check_number`."""
    wanted = f"{length} finite numbers{_range(low, high, open_low, open_high)}"
    if not isinstance(value, (tuple, list)):
        raise TypeError(_message(name, wanted, value))
    if len(value) != length:
        raise ValueError(_message(name, wanted, value))
    options: dict[str, Any] = {
        "low": low,
        "high": high,
        "open_low": open_low,
        "open_high": open_high,
    }
    return tuple(check_number(f"{name}[{i}]", x, **options) for i, x in enumerate(value))


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool; 0, 1, None and strings are refused, as each may be meant otherwise."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(_message(name, "True or False", value))
    return bool(value)


def check_choice(name: str, value: Any, choices: Collection[str], *, or_: str = "") -> str:
    """One of some names; `or_` says what else the caller takes, for the message."""
    given = [repr(c) for c in choices]
    if len(given) == 2 and not or_:
        wanted = f"{given[0]} or {given[1]}"
    else:
        wanted = f"one of {', '.join(given)}" if len(given) > 1 else given[0]
    wanted += f", or {or_}" if or_ else ""
    if not isinstance(value, str):
        raise TypeError(_message(name, wanted, value))
    if value not in choices:
        raise ValueError(_message(name, wanted, value))
    return str(value)


def check_text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(_message(name, "a string", value))
    return str(value)


def check_patterns(name: str, value: Any) -> tuple[str, ...] | None:
    """None, one string, or several; as a tuple."""
    if value is None:
        return None
    if isinstance(value, str):
        return (value,)
    wanted = "a string or a sequence of strings"
    if not isinstance(value, Iterable) or isinstance(value, (bytes, Mapping, Tensor, nn.Module)):
        raise TypeError(_message(name, wanted, value))
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must be {wanted}, got one that holds {shown(pattern)}")
    return patterns


def check_path(name: str, value: Any) -> str:
    """A path, as a string: str or os.PathLike, not empty."""
    wanted = "a path (a string or a pathlib.Path)"
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(_message(name, wanted, value))
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError(_message(name, wanted, value))
    if not path or "\0" in path:
        raise ValueError(_message(name, wanted + " that names something", value))
    return path


def check_module(name: str, value: Any) -> nn.Module:
    """A model."""
    return check_instance(name, value, nn.Module, "a torch.nn.Module")


def check_instance(
    name: str, value: Any, kind: type[T] | tuple[type[T], ...], wanted: str, *, hint: str = ""
) -> T:
    """An object of one of some classes, described by `wanted`."""
    if isinstance(value, kind):
        return value
    if isinstance(value, type) and issubclass(value, kind):
        hint = hint or "make an object of it first"
    raise TypeError(_message(name, wanted, value, hint))


def check_state(value: Any, keys: Collection[str]) -> Mapping[str, Any]:
    """The state of a scheduler: a mapping with these keys."""
    if not isinstance(value, Mapping) or not set(keys) <= set(value):
        raise ValueError(
            f"state must have {' and '.join(keys)}, as state_dict() gives, got {shown(value)}"
        )
    return value


def check_callable(name: str, value: Any, wanted: str = "a function") -> Callable[..., Any]:
    """Something that can be called; `wanted` tells with what."""
    if not callable(value):
        raise TypeError(_message(name, wanted, value))
    return value


def check_tensor(
    name: str,
    value: Any,
    *,
    shape: tuple[int | None, ...] | None = None,
    real: bool = True,
    dtypes: Collection[torch.dtype] | None = None,
) -> Tensor:
    """A tensor, real floating point unless `real` is False; None in `shape` is any size."""
    wanted = "a real floating point tensor" if real else "a tensor"
    if not isinstance(value, Tensor):
        raise TypeError(_message(name, wanted, value))
    if real and not value.is_floating_point():
        raise TypeError(_message(name, wanted, value))
    if dtypes is not None and value.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(_message(name, f"a tensor of dtype {names}", value))
    if shape is not None:
        fits = value.ndim == len(shape) and all(
            want is None or size == want for size, want in zip(value.shape, shape, strict=True)
        )
        if not fits:
            sizes = ", ".join("*" if s is None else str(s) for s in shape)
            comma = "," if len(shape) == 1 else ""
            raise ValueError(_message(name, f"a tensor of shape ({sizes}{comma})", value))
    return value


def check_device(name: str, value: Any) -> torch.device | None:
    """None, or a device that this torch knows by name."""
    wanted = "a torch.device or its name, such as 'cpu' or 'cuda:0'"
    if value is None or isinstance(value, torch.device):
        return value
    if not isinstance(value, (str, numbers.Integral)) or isinstance(value, (bool, np.bool_)):
        raise TypeError(_message(name, wanted, value))
    try:
        return torch.device(value if isinstance(value, str) else int(value))
    except RuntimeError as error:
        raise ValueError(_message(name, wanted, value)) from error


def check_dtype(name: str, value: Any, dtypes: Collection[torch.dtype]) -> torch.dtype | None:
    """None, or one of some dtypes."""
    names = ", ".join(str(d) for d in dtypes)
    if value is not None and (not isinstance(value, torch.dtype) or value not in dtypes):
        raise TypeError(_message(name, f"one of {names}", value))
    return value


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def _inside(
    number: float, low: float | None, high: float | None, open_low: bool, open_high: bool
) -> bool:
    above = low is None or (number > low if open_low else number >= low)
    below = high is None or (number < high if open_high else number <= high)
    return above and below


def _range(
    low: float | None,
    high: float | None,
    open_low: bool,
    open_high: bool,
    *,
    integer: bool = False,
) -> str:
    if low is None and high is None:
        return ""
    if high is None:
        return f" {'>' if open_low else '>='} {low:g}"
    if low is None:
        return f" {'<' if open_high else '<='} {high:g}"
    if integer:
        return f" in {low}..{high}"
    return f" in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"


def _message(name: str, wanted: str, value: Any, hint: str = "") -> str:
    return f"{name} must be {wanted}, got {shown(value)}" + (f": {hint}" if hint else "")
