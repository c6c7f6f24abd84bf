"""Rival rules for CondLRAdam's second moment, kept out of the library: measured, not offered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lrmanifold.manifolds import FixedRank
from lrmanifold.optim import adam

_library = adam.block_moments


def _block(manifold: Any, X: Tensor, xi: Tensor) -> Tensor:
    """The mean square of each block's entries."""
    if not isinstance(manifold, FixedRank):
        return _library(manifold, X, xi)
    return torch.stack([b.square().mean((-2, -1)) for b in manifold.unpack(xi)], -1)


def _point(manifold: Any, X: Tensor, xi: Tensor) -> Tensor:
    """The mean square of all entries, three times."""
    if not isinstance(manifold, FixedRank):
        return _library(manifold, X, xi)
    return xi.square().mean((-2, -1))[..., None].expand(*xi.shape[:-2], 3)


class _Unlimited:
    """Block moments, without the limit on the size of the scaled blocks (the second call)."""

    def __init__(self) -> None:
        self.limit = False

    def __call__(self, manifold: Any, X: Tensor, xi: Tensor) -> Tensor:
        moments, limit = _block(manifold, X, xi), self.limit
        if isinstance(manifold, FixedRank):
            self.limit = not limit
        return torch.zeros_like(moments) if limit else moments


RULES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "library": lambda: _library,
    "block": lambda: _block,
    "point": lambda: _point,
    "block, unlimited": _Unlimited,
}


@contextlib.contextmanager
def moment_rule(name: str) -> Iterator[None]:
    """Inside, CondLRAdam takes its second moments by the rule of that name."""
    adam.block_moments = RULES[name]()  # type: ignore[assignment]
    try:
        yield
    finally:
        adam.block_moments = _library
