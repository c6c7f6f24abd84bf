"""Which conditioning of a convolution counts: of its kernel, of its map, with its norm folded in?

``python -m benchmarks.robustness.conditioning NAME --root DIR`` reads the networks that a run with
``--keep`` left and writes ``conditioning.json`` beside the table. A bound on a kernel need not
reach the map that it makes on images, nor the map that batch norm rescales channel by channel.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrmanifold.experiments.factors import TwoFactors
from lrmanifold.experiments.runs import write_json
from lrmanifold.nn import LowRankConv2d
from lrmanifold.robustness import condition_number

from .. import _shared
from .._record import FOLDER
from .plan import load
from .table import Table, finite

MEASURES = ("kernel", "folded kernel", "map", "folded map")


def kernel_of(layer: Any) -> tuple[Tensor, int] | None:
    """Kernel (o, i, k, k) in float64 and the rank of its matrix; None for what is none."""
    if isinstance(layer, TwoFactors):
        parts: list[Any] = list(layer)
        first, second = (part.weight.detach().double() for part in parts)
        if first.ndim != 4:
            return None
        return torch.einsum("orab,ricd->oicd", second, first), len(first)
    if isinstance(layer, LowRankConv2d):
        return layer.dense_weight().detach().double(), layer.rank
    if isinstance(layer, nn.Conv2d):
        weight = layer.weight.detach().double()
        return weight, min(weight.flatten(1).shape)
    return None


def folded_scale(children: list[Any], place: int, channels: int) -> Tensor:
    """Scale of the batch norm behind a child, pooling aside; ones where there is none."""
    for child in children[place + 1 :]:
        if isinstance(child, nn.BatchNorm2d):
            norm: Any = child
            return (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
        if not isinstance(child, (nn.MaxPool2d, nn.AvgPool2d)):
            break
    return torch.ones(channels, dtype=torch.float64)


def map_values(kernel: Tensor, side: int, rank: int) -> Tensor:
    """Singular values of the convolution on a torus of side x side pixels, `rank` a frequency."""
    turned = torch.fft.fft2(kernel, s=(side, side)).permute(2, 3, 0, 1)
    return torch.linalg.svdvals(turned)[..., :rank].flatten()


def spread(s: Tensor) -> dict[str, float]:
    """Largest over smallest value, and over the middle one; the largest."""
    return {
        "cond": float(s.max() / s.min()),
        "middle": float(s.max() / s.median()),
        "max": float(s.max()),
    }


def layers(model: Any, x: Tensor) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Of every convolution the four measures."""
    children = dict(model.network.named_children())
    z = (x - model.mean) / model.std
    for place, (name, child) in enumerate(children.items()):
        side, found = z.shape[-1], kernel_of(child)
        with torch.no_grad():
            z = child(z)
        if found is None:
            continue
        kernel, rank = found
        scale = folded_scale(list(children.values()), place, len(kernel))
        folded = kernel * scale[:, None, None, None]
        yield (
            name,
            {
                "kernel": spread(torch.linalg.svdvals(kernel.flatten(1))[:rank]),
                "folded kernel": spread(torch.linalg.svdvals(folded.flatten(1))[:rank]),
                "map": spread(map_values(kernel, side, rank)),
                "folded map": spread(map_values(folded, side, rank)),
            },
        )


def measure(folder: Path, scratch: Path, root: str | None, images: int = 100) -> dict[str, Any]:
    """All networks of the plan's rows that are kept in `scratch`."""
    plan = load(folder / "plan.toml")
    data = _shared.load(plan.network.data, root)
    x = data.train_x[
        torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))[:images]
    ]
    found = []
    for row in Table(folder / "runs.jsonl").rows():
        path = scratch / f"{row['key']}.network.pt"
        if row["plan"] != plan.digest or not path.is_file():
            continue
        model = torch.load(path, weights_only=False).eval()
        local = condition_number(model, x).double()
        found.append(
            {
                "family": row["family"],
                "seed": row["seed"],
                "layers": dict(layers(model, x[:2])),
                "network": float(local.median()),
            }
        )
    return finite({"plan": plan.digest, "images": images, "networks": found})


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness.conditioning")
    parser.add_argument("name")
    parser.add_argument("--root")
    parser.add_argument("--results", type=Path, default=FOLDER / "robustness")
    parser.add_argument("--scratch", type=Path, default=FOLDER.parents[1] / "runs" / "robustness")
    options = parser.parse_args()
    folder = options.results / options.name
    write_json(folder / "conditioning.json", measure(folder, options.scratch, options.root))


if __name__ == "__main__":
    main()
