"""Running a model as it is evaluated, and leaving it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluation_mode(model: object) -> Iterator[None]:
    """Put every module inside `model` in evaluation mode, then give each its own flag back."""
    # model.train(flag) would also switch on what somebody froze, say one batch norm
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
