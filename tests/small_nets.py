"""A small smooth network and its images; the low-rank layers of any network, and their drift."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from torch import nn

from lrmanifold.nn import LowRankLayer

# the device fixture is the same for every example hypothesis draws, so sharing it is right
property_test = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def convnet(device, dtype=torch.float64, classes=5):
    """A small smooth network for images 2 x 5 x 5."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 16), nn.Tanh(),
        nn.Linear(16, classes),
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    return net.to(device, dtype).eval()


def images(device, count=12, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 2, 5, 5, generator=generator, dtype=dtype)
    x[:, 0, 0, 0], x[:, 1, 0, 0] = 0, 1  # so that the clip range is felt
    y = torch.randint(0, 5, (count,), generator=generator)
    return x.to(device), y.to(device)


def low_rank_layers(model: nn.Module) -> list[LowRankLayer]:
    return [m for m in model.modules() if isinstance(m, LowRankLayer)]


def drift(model: nn.Module) -> float:
    """The largest of its low-rank weights, also where autocast is on."""
    with torch.autocast("cpu", enabled=False):
        points = [(x.manifold, x.weight.detach().double()) for x in low_rank_layers(model)]
        return max(float(M.drift(X).max()) for M, X in points)
