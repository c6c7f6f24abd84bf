"""Running a model as it is evaluated, and leaving it as it was."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import shown


def module_of(model: Any) -> Any:
    """The module behind a bound method or functools.partial of one; anything else as it is."""
    inner = model
    while True:
        if isinstance(inner, functools.partial):
            inner = inner.func
        elif isinstance(inner, types.MethodType):
            inner = inner.__self__
        else:
            return inner if isinstance(inner, nn.Module) else model


_FUNCTION = (
    "pass a function that takes the logits out of it, such as lambda x: model(x)[0] or "
    "lambda x: model(x).logits, and put the model in evaluation mode yourself"
)


def check_output(logits: Any, *, instead: str = _FUNCTION) -> Tensor:
    """What a model returned, if it is a tensor; else TypeError that says what to pass `instead`."""
    if not isinstance(logits, Tensor):
        kind = type(logits).__name__
        raise TypeError(
            f"model must return a tensor of logits (B, classes), got an object of class {kind}: "
            + instead
        )
    return logits


def check_attacked(z: Any, x: Tensor) -> Tensor:
    """What an attack on the images x returned, if it is images."""
    if not isinstance(z, Tensor) or z.shape != x.shape:
        raise TypeError(f"attack must return images of shape {tuple(x.shape)}, got {shown(z)}")
    if not bool(torch.isfinite(z).all()):
        raise ValueError("attack must return finite images, got NaN or Inf")
    return z


@contextlib.contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Put every module inside `model` in evaluation mode, then give each its own flag back.

    A bound method of a module, such as ``model.forward``, stands for the module.
    """
    # model.train(flag) would also switch on what somebody froze, say one batch norm
    model = module_of(model)
    found = model.modules() if isinstance(model, nn.Module) else ()
    modules = [m for m in found if hasattr(m, "training")]  # frozen scripts have none
    flags = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
