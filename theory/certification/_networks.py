"""Small networks as lists of matrices, with activations of slope at most 1."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..core import Sample
from ..sampling import Draw


def maxmin(z: Tensor) -> Tensor:
    half = z.shape[-1] // 2
    a, b, rest = z[..., :half], z[..., half : 2 * half], z[..., 2 * half :]
    return torch.cat((torch.maximum(a, b), torch.minimum(a, b), rest), -1)


ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "maxmin": maxmin, "none": lambda z: z}


def random_network(seed: int, dtype: torch.dtype, device: torch.device, **fixed) -> Sample:
    """Layers of low rank, an activation, whether layers are residual, a pair of inputs."""
    draw = Draw(seed, dtype, device, **fixed)
    act = draw.choose(*ACTIVATIONS)
    residual = draw.choose(False, False, True)
    n = draw.integer(2, 6)
    sizes = [n] + [n if residual else draw.integer(2, 6) for _ in range(draw.integer(1, 3))]
    layers = []
    for a, b in itertools.pairwise(sizes):
        r = draw.integer(1, min(a, b))
        layers.append(draw.give(draw.normal(b, r) @ draw.normal(r, a)))
    classes = draw.integer(2, 4)
    x = draw.normal(n)
    return {
        "layers": layers,
        "act": act,
        "residual": residual,
        "head": draw.give(draw.normal(classes, sizes[-1])),
        "x": draw.give(x),
        "step": draw.give(draw.log_uniform(1e-3, 10.0) * draw.normal(n)),
    }


def body(sample: Sample, x: Tensor) -> Tensor:
    for W in sample["layers"]:
        y = ACTIVATIONS[sample["act"]](x @ W.mT)
        x = x + y if sample["residual"] else y
    return x


def norms(sample: Sample) -> list[float]:
    """Of each layer, 1 added where it is residual."""
    extra = 1.0 if sample["residual"] else 0.0
    return [extra + float(torch.linalg.matrix_norm(W, 2)) for W in sample["layers"]]


def aligned(seed: int, dtype: torch.dtype, device: torch.device) -> Sample:
    """Linear layers of rank 1 that pass their largest direction on: every bound is attained."""
    draw = Draw(seed, dtype, device)
    n = draw.integer(3, 5)
    units = [torch.nn.functional.normalize(draw.normal(n), dim=0) for _ in range(4)]
    scales = [draw.uniform(0.5, 3.0) for _ in range(3)]
    layers = [
        draw.give(c * torch.outer(b, a))
        for c, a, b in zip(scales, units[:-1], units[1:], strict=True)
    ]
    head = torch.stack((units[-1], -units[-1]))
    return {
        "layers": layers,
        "act": "none",
        "residual": False,
        "head": draw.give(head),
        "x": draw.give(0.3 * units[0]),
        "step": draw.give(units[0]),
    }
