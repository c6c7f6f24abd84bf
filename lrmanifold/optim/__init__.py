"""Riemannian optimizers for low-rank weights."""

from ._rank import resize
from .adam import CondLRAdam, adam_update
from .condlr import CondLR, condlr_update
from .dlrt import DLRT
from .groups import param_groups
from .rank_scheduler import RankScheduler
from .recipes import capped_dlrt, robust_dlrt
from .schedule import OptionScheduler

__all__ = [
    "DLRT",
    "CondLR",
    "CondLRAdam",
    "OptionScheduler",
    "RankScheduler",
    "adam_update",
    "capped_dlrt",
    "condlr_update",
    "param_groups",
    "resize",
    "robust_dlrt",
]
