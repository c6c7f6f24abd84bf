"""What the engine is told: a rule, and the parameters of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import geoopt
import torch
from torch import Tensor

from ..manifolds import FixedRank
from ..precision import compute_dtype


class Rule(NamedTuple):
    """What an optimizer does, and the names of what it remembers.

    Attributes
    ----------
    move : callable
        ``(M, X, G, state, options) -> (Y, state)`` for parameters on manifolds; see
        ``lrmanifold.optim.step``.
    move_dense : callable
        The same for ordinary parameters, entry by entry.
    vectors : tuple of str
        Names of the state's vectors, which have the parameter's shape and dtype.
    moments : tuple of str
        Names of second moments: one number a block (an entry of an ordinary parameter), in the
        compute dtype.
    switch : str, optional
        Option without which there are no vectors, such as "momentum".
    """

    move: Callable[..., tuple]
    move_dense: Callable[..., tuple]
    vectors: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    switch: str | None = None

    def names(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """All that a step with these options needs to remember."""
        vectors = self.vectors if self.switch is None or options.get(self.switch) else ()
        return (*vectors, *self.moments)


@dataclass
class Item:
    """One parameter in one step; `point` is what is written to, `key` whom it belongs to."""

    group: dict[str, Any]
    key: Tensor
    point: Tensor
    grad: Tensor
    manifold: geoopt.Manifold | None
    label: str
    state: dict[str, Any]

    def remembered(self, name: str, rule: Rule) -> Tensor:
        """An entry of the state; zero before the first step."""
        if name in self.state:
            return self.state[name]
        X, M = self.point, self.manifold
        if name not in rule.moments:
            return torch.zeros_like(X)
        shape: tuple[int, ...] = X.shape
        if isinstance(M, FixedRank):
            shape = (*X.shape[:-2], 3)  # a number a block
        elif M is not None:
            shape = M.inner(X, X, keepdim=True).shape
        return X.new_zeros(shape, dtype=compute_dtype(X.dtype))
