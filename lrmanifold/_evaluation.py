"""Running a model as it is evaluated, and leaving it as it was."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn


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


@contextlib.contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Put every module inside `model` in evaluation mode, then give each its own flag back.

    A bound method of a module, such as ``model.forward``, stands for the module.
    """
    # model.train(flag) would also switch on what somebody froze, say one batch norm
    model = module_of(model)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
