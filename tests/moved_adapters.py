"""Adapters that change something."""

import torch
from torch import nn

from lrmanifold.nn import Change


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """The model with another point in every adapter: a change that is not zero."""
    for change in (m for m in model.modules() if isinstance(m, Change)):
        X = change.update.weight
        X.copy_(change.update.manifold.random(*X.shape, dtype=torch.float64, device=X.device))
    return model
