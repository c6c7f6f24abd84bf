"""Dense layers that a conversion at rank 2 does not change, and the plan of a conversion."""

from __future__ import annotations

import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import Plan

EXACT = {"rtol": 0, "atol": 1e-12}


def low_rank_dense(m: int = 12, n: int = 10, rank: int = 2, **options) -> nn.Linear:
    """A dense layer whose weight has that rank: converting it without a bound changes nothing."""
    layer = nn.Linear(n, m, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(m, rank).double() @ torch.randn(rank, n).double())
    return layer


def low_rank_conv() -> nn.Conv2d:
    layer = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)
    with torch.no_grad():
        kernels = torch.randn(2, 3, 2).double() @ torch.randn(2, 2, 18).double()
        layer.weight.copy_(kernels.view(6, 2, 3, 3))
    return layer


def plan_of(model: nn.Module, **options) -> dict[str, str]:
    """Names to reasons; "" for what became low-rank."""
    plans: list[Plan] = []
    lrm.factorize(model, rank=2, tau=None, keep_larger=True, summary=plans.append, **options)
    return {d.name: d.reason for d in plans[0].decisions}
