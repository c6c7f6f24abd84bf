"""What stands in a row: accuracy clean and attacked, size, cost, conditioning, calibration."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lrmanifold as lrm
from lrmanifold import robustness
from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.factors import TwoFactors
from lrmanifold.experiments.methods import Trained
from lrmanifold.experiments.orthogonal import OrthogonalConv2d, plain_layers
from lrmanifold.nn import LowRankLayer

from . import bound
from .plan import Attack, Plan, PlanError, Search

ATTACKS = ("pgd", "apgd-ce", "apgd-t", "fab-t", "square")


def multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Multiplications of one forward pass of `image` (1, C, H, W) in linear and conv layers.

    Low-rank layers with the core folded: r (m + n) for each output position.
    """
    total = 0
    handles = []

    def count(module: Any, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, LowRankLayer):
            m, n, r = module.manifold.m, module.manifold.n, module.rank
            total += output.numel() // m * r * (m + n)
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        else:
            kernel = math.prod(module.kernel_size)
            total += output.numel() * module.in_channels // module.groups * kernel

    for module in network.modules():
        if isinstance(module, (LowRankLayer, nn.Linear, nn.Conv2d, OrthogonalConv2d)):
            handles.append(module.register_forward_hook(count))
    try:
        with torch.no_grad():
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return total


def layer_conds(model: nn.Module) -> dict[str, dict[str, float]]:
    """cond, largest and smallest nonzero singular value of each layer's weight as a matrix."""
    found: dict[str, dict[str, float]] = {}
    pairs = {n: m for n, m in model.named_modules() if isinstance(m, TwoFactors)}
    for layer in lrm.report(model).layers:
        if any(layer.name.startswith(f"{name}.") for name in pairs):
            continue
        name = layer.name.removeprefix("network.").removesuffix(".matrix")
        found[name] = {
            "rank": layer.rank,
            "cond": layer.cond,
            "max": layer.sigma_max,
            "min": layer.sigma_min,
        }
    for name, pair in pairs.items():
        s = pair.svdvals()
        found[name.removeprefix("network.")] = {
            "rank": len(s),
            "cond": float(s[0] / s[-1]),
            "max": float(s[0]),
            "min": float(s[-1]),
        }
    return found


def drawn(data: Dataset, count: int, skip: int = 0) -> tuple[Tensor, Tensor]:
    """So many test images, drawn at random by a fixed seed: the first ones may be easier."""
    order = torch.randperm(len(data.test_y), generator=torch.Generator().manual_seed(0))
    order = order[skip : skip + count]
    return data.test_x[order], data.test_y[order]


def check_drawn(data: Dataset, asked: Attack) -> None:
    """Refuse to skip so many test images that fewer than those asked for are left."""
    there = len(data.test_y)
    if asked.skip and asked.skip + asked.images > there:
        raise PlanError(
            f"skip = {asked.skip} and images = {asked.images} of [attack]: together they must be "
            f"at most the {there} test images of {data.name}"
        )


def check_logits(model: nn.Module, data: Dataset) -> None:
    """FloatingPointError if the network overflows on test images though its weights do not."""
    device = next(model.parameters()).device
    with robustness.evaluation_mode(model), torch.no_grad():
        parts = (model(x.to(device)) for x in data.test_x.split(512))
        if not all(bool(torch.isfinite(z).all()) for z in parts):
            raise FloatingPointError("the logits of the trained network are not finite")


def at_once(model: nn.Module) -> int:
    """Images a batch: on an accelerator the launches take the time, not the images."""
    return 256 if next(model.parameters()).device.type == "cpu" else 2048


def laid_out(model: nn.Module) -> nn.Module:
    """A copy for attacks, the same function: orthogonal matrices as they stand; on a processor,
    which runs it nearly twice as fast, cores folded and convolutions with the channels last."""
    copied = plain_layers(copy.deepcopy(model))
    if next(model.parameters()).device.type != "cpu":
        return copied
    if any(isinstance(layer, LowRankLayer) for layer in copied.modules()):
        copied = lrm.fold(copied)
    return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def clean(model: nn.Module, data: Dataset) -> dict[str, Any]:
    """Accuracy, cross entropy and calibration error on all test images."""
    device = next(model.parameters()).device
    with robustness.evaluation_mode(model), torch.no_grad():
        logits = torch.cat([model(x.to(device)).float().cpu() for x in data.test_x.split(512)])
    right = logits.argmax(1) == data.test_y
    return {
        "accuracy": float(right.float().mean()),
        "right": packed(right),
        "images": len(right),
        "cross_entropy": float(nn.functional.cross_entropy(logits, data.test_y)),
        "ece": calibration(logits, data.test_y),
    }


def calibration(logits: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean |confidence - accuracy| over equal bins of confidence."""
    confidence, label = logits.softmax(1).max(1)
    right = (label == y).float()
    place = (confidence * bins).long().clamp_max(bins - 1)
    gap = torch.zeros(bins).index_add_(0, place, confidence - right)
    return float(gap.abs().sum() / len(y))


def worst_case(
    model: nn.Module, images: tuple[Tensor, Tensor], eps: float, asked: Search | Attack, norm: Any
) -> dict[str, Any]:
    """Accuracy under the worst of the attacks, what each left, and which they were.

    Without pyautoattack our PGD on the margin is alone, with ten restarts; `attacks` says so.
    """
    names = getattr(asked, "attacks", ATTACKS)
    there = importlib.util.find_spec("pyautoattack") is not None
    options: dict[str, Any] = {"attacks": names, "restarts": asked.restarts}
    if not there:
        options = {"attacks": ("pgd",), "restarts": max(10, asked.restarts)}
    found = robustness.worst_case(
        model, images, eps, norm=norm, steps=asked.steps, queries=asked.queries,
        batch_size=at_once(model), **options,
    )  # fmt: skip
    return {
        "accuracy": found.accuracy,
        "after": found.after,
        "attacks": list(found.after),
        "robust": packed(found.robust),
    }


def packed(mask: Tensor) -> str:
    """Yes or no for every image, eight to a byte, in hexadecimal."""
    return np.packbits(mask.numpy()).tobytes().hex()


def unpacked(text: str, count: int) -> Any:
    """What :func:`packed` packed: a Boolean array of `count` images."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
    return bits[:count].astype(bool)


def everything(
    trained: Trained, data: Dataset, plan: Plan, source: nn.Module | None, *, once: bool
) -> dict[str, Any]:
    """All that stands in a row; `once` adds what one seed is enough for."""
    model, asked = trained.model.eval(), plan.attack
    attacked = laid_out(model)
    x, y = drawn(data, asked.images, asked.skip)
    device = model.mean.device
    images = (x.to(device), y.to(device))
    norm: Any = asked.norm
    found: dict[str, Any] = {
        "clean": clean(model, data),
        "worst": {
            f"{eps:g}": worst_case(attacked, images, eps, asked, norm)
            for eps in sorted({asked.eps, *asked.worst})
        },
        "worst_l2": {
            f"{eps:g}": worst_case(attacked, images, eps, asked, "l2") for eps in asked.worst_l2
        },
        "images": len(y),
        "trained_share": trained.weights_kept,
        "stored_share": trained.inference_kept,
        "multiply_adds": multiply_adds(model, x[:1].to(device)),
        "layers": layer_conds(model),
        "cond": trained.history.cond,
        "loss": trained.history.loss,
    }

    def under(attack: Any, strengths: Any, pair: tuple[Tensor, Tensor]) -> dict[str, float]:
        curve = robustness.accuracy_under_attack(
            attacked, pair, attack, strengths, batch_size=at_once(model)
        )
        return {f"{eps:g}": value for eps, value in curve.items()}

    def fast(f: Any, z: Tensor, c: Tensor, eps: float) -> Tensor:
        return robustness.fgsm(f, z, c, eps, norm=norm)

    def strong(f: Any, z: Tensor, c: Tensor, eps: float) -> Tensor:
        seeded = torch.Generator().manual_seed(0)
        return robustness.pgd(f, z, c, eps, norm=norm, steps=20, generator=seeded)

    if asked.fgsm:
        whole = (data.test_x.to(device), data.test_y.to(device))
        found["fgsm"] = under(fast, asked.fgsm, whole)
    if asked.pgd:
        found["pgd"] = under(strong, asked.pgd, images)
    if asked.transfer and source is not None:
        other = laid_out(source)
        found["transfer"] = under(
            lambda _, z, c, eps: strong(other, z, c, eps), asked.transfer, images
        )
    if once and asked.condition_images:
        found["condition"] = bound.compare(model, data.test_x[: asked.condition_images])
    if once and asked.masking_images and importlib.util.find_spec("pyautoattack"):
        few = (images[0][: asked.masking_images], images[1][: asked.masking_images])
        check = robustness.check_masking(attacked, few, asked.eps, norm=norm, queries=4000)
        found["masking"] = {
            "failed": [name for name, passed in check.verdicts.items() if not passed],
            "one_step": check.one_step,
            "many_steps": check.many_steps,
            "black_box": {str(q): a for q, a in check.black_box.items()},
            "only_black_box": check.only_black_box,
            "climbed": check.climbed,
            "unlimited": check.unlimited,
            "images": check.samples,
        }
    return found
