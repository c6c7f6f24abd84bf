"""Accuracy under one attack, at one strength after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .._arguments import (
    check_callable,
    check_device,
    check_instance,
    check_integer,
    check_number,
    shown,
)
from .._evaluation import check_attacked, evaluation_mode
from ._common import Data, Model, PerChannel, batches, normalized, right


def accuracy_under_attack(
    model: Model,
    data: Data,
    attack: Callable[..., Tensor],
    strengths: Iterable[float],
    *,
    mean: PerChannel = None,
    std: PerChannel = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    **options: Any,
) -> dict[float, float]:
    """Share of samples classified rightly at each strength; strength 0 is clean accuracy.

    The data is gone through once. A sample that an attack happens to put right counts as right,
    as in the published tables. Returns a dict, strength -> accuracy, in the order given.

    Parameters
    ----------
    data : tensors (x, y), cut into batches of `batch_size`, or an iterable of batches
        Images before normalisation, and their classes.
    attack : callable (model, x, y, eps, **options) -> Tensor
        :func:`fgsm`, :func:`pgd` or your own; gets `mean` and `std` too when they are given.
    device : where to compute; None: where the model's first parameter lies, or else each batch
    options : further arguments of `attack`, such as ``steps=20, norm="l2"``
    """
    check_callable("model", model, "a module or a function of images")
    check_callable("attack", attack, "a function (model, x, y, eps, **options)")
    size = check_integer("batch_size", batch_size, low=1)
    check_device("device", device)
    check_instance("strengths", strengths, Iterable, "a list of numbers")  # type: ignore[type-abstract]
    if isinstance(strengths, (str, bytes)):
        raise TypeError(
            f"strengths must be a list of numbers, as [0.0, 0.1], got {shown(strengths)}"
        )
    found, total = {check_number("strengths", eps, low=0): 0 for eps in strengths}, 0
    if mean is not None or std is not None:
        options |= {"mean": mean, "std": std}
    with evaluation_mode(model):
        for x, y in batches(data, size, model, device):
            f = normalized(model, x, mean, std)
            for eps in found:
                # a copy: an attack may write into what it is given
                z = check_attacked(attack(model, x.clone(), y, eps, **options), x) if eps else x
                found[eps] += int(right(f, z, y).sum())
            total += len(y)
    if not total or not found:
        raise ValueError(f"nothing to measure: {total} samples, {len(found)} strengths")
    return {eps: count / total for eps, count in found.items()}
