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
    low_rank : tuple of str, optional
        What low-rank weights remember, where all others remember the rest; None where all
        remember the same.
    """

    move: Callable[..., tuple]
    move_dense: Callable[..., tuple]
    vectors: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    switch: str | None = None
    low_rank: tuple[str, ...] | None = None

    def names(self, options: Mapping[str, Any], manifold: Any = None) -> tuple[str, ...]:
        """All that a step of a parameter on `manifold` with these options needs to remember."""
        off = () if self.switch is None or options.get(self.switch) else self.vectors
        return tuple(name for name in self.known(manifold) if name not in off)

    def known(self, manifold: Any = None) -> tuple[str, ...]:
        """All that a parameter on `manifold` may remember, whatever the options."""
        names = (*self.vectors, *self.moments)
        if self.low_rank is None:
            return names
        own = isinstance(manifold, FixedRank)
        return tuple(name for name in names if (name in self.low_rank) == own)


@dataclass
class Item:
    """One parameter in one step; `point` is what is written to, `key` whom it belongs to."""

    group: dict[str, Any]
    key: Tensor
    point: Tensor
    grad: Tensor
    manifold: geoopt.Manifold | None
    label: Any  # shows as the parameter's name
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
