"""Rival rules for CondLRAdam's second moment, kept out of the library: measured, not offered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lrmanifold.optim.coordinates import Ambient

_library = Ambient.block_moments


def _block(M: Any, X: Any, v: Any) -> Tensor:
    """The mean square of each block's entries."""
    if not M.low_rank:
        return _library(M, X, v)
    return torch.stack([b.square().mean((-2, -1)) for b in v], -1)


def _point(M: Any, X: Any, v: Any) -> Tensor:
    """The mean square of all entries, three times."""
    if not M.low_rank:
        return _library(M, X, v)
    squares = torch.cat([b.square() for b in v], -2)
    return squares.mean((-2, -1))[..., None].expand(*squares.shape[:-2], 3)


class _Unlimited:
    """Block moments, without the limit on the size of the scaled blocks (the second call)."""

    def __init__(self) -> None:
        self.limit = False

    def __call__(self, M: Any, X: Any, v: Any) -> Tensor:
        moments, limit = _block(M, X, v), self.limit
        if M.low_rank:
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
    rule = RULES[name]()
    Ambient.block_moments = lambda M, X, v: rule(M, X, v)  # type: ignore
    try:
        yield
    finally:
        Ambient.block_moments = _library  # type: ignore[method-assign]
