"""Several gradients a step: the evaluations of a closure, and what DLRT makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..factors import Factors
from .arithmetic import PlainArithmetic
from .step import core_force


class Evaluations:
    """The evaluations of one step."""

    def __init__(
        self, closure: Callable[[], Any], arithmetic: PlainArithmetic, params: list[Tensor]
    ) -> None:
        self._closure, self._arithmetic, self._params = closure, arithmetic, params
        self.losses: list[Any] = []
        self.used: set[Tensor] = set()

    def evaluate(self) -> None:
        """Call the closure; note which weights it used, and that their gradients are finite."""
        self.losses.append(self._arithmetic.evaluate(self._closure))
        for p in self._params:
            if p.grad is not None:
                self.used.add(p)
                if not bool(torch.isfinite(p.grad).all()):
                    raise NonFiniteError(p)


def forced(slope: Tensor, X: Factors, group: dict[str, Any]) -> Tensor:
    """The slope of the core with decay and penalty."""
    force = core_force(X, group)
    return slope if force is None else slope + force


class NonFiniteError(Exception):
    """The gradient of a parameter holds NaN or Inf."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
