"""Small networks with images that they classify rightly, for the tests of attacks."""

from __future__ import annotations

import math

import torch
from torch import nn


def network(device, classes=5, shape=(2, 6, 6), dtype=torch.float32):
    torch.manual_seed(0)
    size = math.prod(shape)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(size, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Dropout(0.3),
        nn.Linear(24, classes),
    )  # fmt: skip
    with torch.no_grad():
        net[-1].weight.mul_(60)
    return net.to(device, dtype).eval()


def labelled(net, device, count=60, shape=(2, 6, 6), dtype=torch.float32, wrong=6):
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    y = net(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % net[-1].out_features
    return x, y
