"""Riemannian optimizers for low-rank weights."""

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

from ._stale import warn_of_stale_optimizer
from ._watch import warn_of_foreign_optimizer
from .accelerator import force_accelerator
from .adam import CondLRAdam
from .adam_step import adam_update
from .averaging import RetractingAverage, average_points, retracting_average
from .condlr import CondLR
from .dlrt import DLRT
from .groups import param_groups
from .items import Rule
from .muon import CondLRMuon
from .optimizer import GeometricOptimizer
from .rank import resize
from .recipes import capped_dlrt, robust_dlrt
from .schedule import OptionScheduler
from .step import condlr_update

register_optimizer_step_post_hook(warn_of_foreign_optimizer)
register_optimizer_step_post_hook(warn_of_stale_optimizer)

__all__ = [
    "DLRT",
    "CondLR",
    "CondLRAdam",
    "CondLRMuon",
    "GeometricOptimizer",
    "OptionScheduler",
    "RankScheduler",
    "RetractingAverage",
    "Rule",
    "adam_update",
    "average_points",
    "capped_dlrt",
    "condlr_update",
    "force_accelerator",
    "param_groups",
    "resize",
    "retracting_average",
    "robust_dlrt",
]


def __getattr__(name: str) -> Any:
    # It stands above nn and optim, and is still found here.
    if name == "RankScheduler":
        from ..adaptive import RankScheduler

        return RankScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
