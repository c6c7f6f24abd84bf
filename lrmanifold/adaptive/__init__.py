"""Ranks that follow the problem: above layers and optimizers, which they resize together."""

from .scheduler import RankScheduler

__all__ = ["RankScheduler"]
