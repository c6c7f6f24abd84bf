"""Riemannian optimizers for low-rank weights."""

from .condlr import CondLR, condlr_update
from .groups import param_groups

__all__ = ["CondLR", "condlr_update", "param_groups"]
