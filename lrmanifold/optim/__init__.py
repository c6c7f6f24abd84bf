"""Riemannian optimizers for low-rank weights."""

from ._rank import resize
from .adam import CondLRAdam, adam_update
from .averaging import RetractingAverage, average_points, retracting_average
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
    "RetractingAverage",
    "adam_update",
    "average_points",
    "capped_dlrt",
    "condlr_update",
    "param_groups",
    "resize",
    "retracting_average",
    "robust_dlrt",
]
