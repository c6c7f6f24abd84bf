"""Kernel launches of an optimizer's steady step, counted where every machine can count them.

Without a GPU the model is on torch's meta device: tensors have shapes and no values, so that the
step takes the way of accelerators, and every operation that is no view is one launch (a ``foreach``
operation counts once; on CUDA it is one launch for some hundred tensors). On CUDA the kernels are
counted by torch's profiler.

    python -m benchmarks.speed.launches [--device cuda] [--kinds] [--output DIR]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrmanifold as lrm
from lrmanifold.optim import CondLR, CondLRAdam

from .._record import conditions

# Views under the dispatcher that torch does not mark as such, and host-side scalars.
_FREE = ("detach", "view", "unsafe_view", "split", "unbind", "expand", "alias", "scalar_tensor")
_VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def vgg16() -> nn.Module:
    """VGG16 with batch norm for 32 x 32 images; the last layer stays dense."""
    layers: list[nn.Module] = []
    channels = 3
    for width in _VGG:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def transformer() -> nn.Module:
    """The matrices and norms of 12 layers, 768 wide."""

    def block() -> nn.Module:
        square = [nn.Linear(768, 768) for _ in range(4)]
        wide = [nn.Linear(768, 3072), nn.Linear(3072, 768)]
        return nn.ModuleList([*square, *wide, nn.LayerNorm(768), nn.LayerNorm(768)])

    return nn.ModuleList([block() for _ in range(12)])


def steady_step(
    build: Callable[[], nn.Module],
    kind: Callable[..., Any],
    options: dict[str, Any],
    *,
    share: float,
    tau: float | None,
    device: str = "meta",
) -> tuple[nn.Module, Any]:
    """A low-rank model with gradients, and its optimizer after the first step."""
    with torch.device(device):
        model = build()
        last = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
        exclude = [last] if build is vgg16 else None
        lrm.factorize(model, rank=share, tau=tau, exclude=exclude, keep_larger=True)
    optimizer = kind(model.parameters(), **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if device != "meta" else torch.empty_like(p)
    optimizer.step()
    return model, optimizer


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0].lstrip("_")
        if not func.is_view and not name.startswith(_FREE):
            self.kinds[name] += 1
        return func(*args, **(kwargs or {}))


def count(step: Callable[[], Any], device: str = "meta") -> Counter[str]:
    """Launches of one call, by kind."""
    if device != "cuda":
        with _Count() as mode:
            step()
        return mode.kinds
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    launches = (e.name for e in trace.events() or [] if "LaunchKernel" in e.name)
    return Counter(launches)


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="meta", choices=["meta", "cuda"])
    parser.add_argument("--kinds", action="store_true", help="list the kinds of operation too")
    parser.add_argument("--output", type=Path, help="folder for speed_launches.json")
    chosen = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    rules: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
        ("CondLR", CondLR, {"lr": 0.1, "momentum": 0.9}),
        ("CondLR, scalar metric", CondLR, {"lr": 0.1, "momentum": 0.9, "metric": "scalar"}),
        ("CondLRAdam", CondLRAdam, {"lr": 1e-3}),
    ]
    print(f"{'network, share of the rank':34} {'rule':22} {'τ=.1':>6} {'τ=0':>6} {'none':>6}")
    for build, share in ((vgg16, 0.2), (vgg16, 0.5), (transformer, 0.1), (transformer, 0.2)):
        for name, kind, options in rules:
            found = []
            for tau in (0.1, 0.0, None):
                _, optimizer = steady_step(
                    build, kind, options, share=share, tau=tau, device=chosen.device
                )
                found.append(count(optimizer.step, chosen.device))
            by_tau = dict(zip(("0.1", "0", "none"), map(dict, found), strict=True))
            rows.append({"network": build.__name__, "share": share, "rule": name, "by tau": by_tau})
            numbers = " ".join(f"{sum(kinds.values()):6d}" for kinds in found)
            print(f"{build.__name__ + f' {share:.0%}':34} {name:22} {numbers}")
            if chosen.kinds:
                print("   " + ", ".join(f"{k} {n}" for k, n in found[0].most_common(12)))
    if chosen.output is not None:
        chosen.output.mkdir(parents=True, exist_ok=True)
        payload = {"conditions": {**conditions(), "device": chosen.device}, "results": rows}
        (chosen.output / "speed_launches.json").write_text(json.dumps(payload, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
