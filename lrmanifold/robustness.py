"""How easily is a network fooled: gradient attacks and the local condition number.

**Units.** `x` is always the image *before* normalisation, `eps` is in its unit, and `mean`, `std`
per channel are applied inside: the model sees ``(x - mean) / std``. The scaled, unclipped attack
of the published CIFAR tables, ``x_norm + eps * sign(g) / std`` on normalised input, is
``clip=None``: it is ``x + eps * sign(g)``, normalised (g has the same sign either way).

**Nothing of the model changes.** A module runs in evaluation mode and gets each training flag
back; gradients are taken with respect to the input only, so `.grad`, `requires_grad` and buffers
stay. To attack a module in train mode pass a plain function that calls it.

**What these attacks cannot show.** They follow the gradient and find too little where it vanishes
or misleads (saturated softmax, random layers): look also at an attack without gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._arguments import (
    check_callable,
    check_choice,
    check_device,
    check_flag,
    check_instance,
    check_integer,
    check_number,
    check_numbers,
    check_tensor,
    shown,
)
from ._evaluation import evaluation_mode
from ._local_condition import condition_number

__all__ = ["accuracy_under_attack", "condition_number", "evaluation_mode", "fgsm", "pgd"]

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Norm = Literal["linf", "l2"]
Clip = tuple[float, float] | None
PerChannel = float | Sequence[float] | Tensor | None

cross_entropy: Loss = functools.partial(functional.cross_entropy, reduction="none")


def fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    clip: Clip = (0.0, 1.0),
    mean: PerChannel = None,
    std: PerChannel = None,
    norm: Norm = "linf",
    loss: Loss = cross_entropy,
) -> Tensor:
    """One step of length `eps` up the loss: x + eps sign(g) (linf) or x + eps g / |g|_2 (l2).

    The result has shape and unit of `x`. One forward and one backward pass. A sample with zero
    gradient comes back as it was. Source: Goodfellow, Shlens, Szegedy, ICLR 2015.

    Parameters
    ----------
    model : callable, (B, ...) -> logits (B, classes)
    x, y : Tensor, shapes (B, ...) and (B,)
        Images before normalisation, floating point, inside `clip`; their true classes.
    clip : (low, high) or None
        The range of valid images; None leaves the result unclipped.
    mean, std : one number or C numbers, given together
        Normalisation per channel (dimension 1 of `x`).
    loss : callable (logits, y) -> (B,) or scalar
    """
    eps = check_number("eps", eps, low=0)
    with torch.inference_mode(False), evaluation_mode(model):
        x, y, f, box = _prepare(model, x, y, norm, clip, mean, std, loss)
        return (x + eps * _steepest(_gradient(f, loss, x, y), norm)).clamp(*box) if eps else x


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    norm: Norm = "linf",
    clip: Clip = (0.0, 1.0),
    mean: PerChannel = None,
    std: PerChannel = None,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
) -> Tensor:
    """Projected gradient ascent in the ball of radius `eps` about `x`, worst of the restarts.

    Each step is fgsm's with `step_size`, then projected on the ball, then clipped (which only
    shortens it). Of the restarts' last iterates each sample keeps one that fools the model, if
    any does, and among equals the largest margin max_{j != y} z_j - z_y of the logits. From equal
    generators, more restarts are never weaker. Source: Madry et al., ICLR 2018. Parameters not
    listed, and the result, are as for :func:`fgsm`.

    Parameters
    ----------
    step_size : float, optional
        None takes 2.5 eps / steps (Madry et al.): enough to cross the ball.
    restarts, random_start : int, bool
        Runs start uniformly (by volume) in the ball; False: one run, from `x` itself.
    generator : torch.Generator, optional
        Source of the starts; one on the CPU gives the same starts for every device of `x`. None
        takes torch's global one.
    """
    eps, steps = check_number("eps", eps, low=0), check_integer("steps", steps, low=1)
    restarts = check_integer("restarts", restarts, low=1)
    length = check_number("step_size", 2.5 * eps / steps if step_size is None else step_size, low=0)
    check_flag("random_start", random_start)
    if generator is not None:
        check_instance("generator", generator, torch.Generator, "a torch.Generator")
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts must be 1 with random_start=False, got {restarts}")
    with torch.inference_mode(False), evaluation_mode(model):
        x, y, f, box = _prepare(model, x, y, norm, clip, mean, std, loss)
        worst, score = x.clone(), torch.full_like(x.flatten(1)[:, 0], -math.inf)
        for _ in range(restarts if eps else 0):
            z = x
            if random_start:
                z = (x + eps * _uniform_in_unit_ball(x, norm, generator)).clamp(*box)
            for _ in range(steps):
                change = z + length * _steepest(_gradient(f, loss, z, y), norm) - x
                z = (x + _project(change, eps, norm)).clamp(*box)
            if restarts == 1:
                return z
            with torch.no_grad():
                logits = _logits(f, z, y)
            own = logits.gather(1, y[:, None])[:, 0]
            margin = logits.scatter(1, y[:, None], -math.inf).amax(1) - own
            # fooled ranks above not fooled even where two logits are equal
            floor = torch.where(logits.argmax(1) == y, -math.inf, torch.finfo(own.dtype).tiny)
            margin = torch.maximum(margin, floor.to(margin))
            worst[margin > score] = z[margin > score]
            score = torch.maximum(margin, score)
        return worst


def accuracy_under_attack(
    model: Model,
    data: Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor],
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
    check_instance("strengths", strengths, Iterable, "numbers")  # type: ignore[type-abstract]
    if isinstance(strengths, (str, bytes)):
        raise TypeError(f"strengths must be numbers, got {shown(strengths)}")
    right, total = {check_number("strengths", eps, low=0): 0 for eps in strengths}, 0
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise TypeError(f"data must be (x, y) or batches of it, got {shown(data)}")
    if device is None and isinstance(model, nn.Module):
        device = next((p.device for p in model.parameters()), None)
    if mean is not None or std is not None:
        options |= {"mean": mean, "std": std}
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor):
        _check_batch(*data)
        data = zip(data[0].split(size), data[1].split(size), strict=True)
    with evaluation_mode(model):
        for batch in data:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"data must give pairs (x, y), got {shown(batch)}")
            x, y = batch
            _check_batch(x, y)
            x, y = x.to(device), y.to(device)
            f = _normalized(model, x, mean, std)
            for eps in right:
                z = attack(model, x, y, eps, **options) if eps else x
                with torch.no_grad():
                    right[eps] += int((_logits(f, z, y).argmax(1) == y).sum())
            total += len(y)
    if not total or not right:
        raise ValueError(f"nothing to measure: {total} samples, {len(right)} strengths")
    return {eps: count / total for eps, count in right.items()}


def _prepare(
    model: Model,
    x: Tensor,
    y: Tensor,
    norm: str,
    clip: Clip,
    mean: PerChannel,
    std: PerChannel,
    loss: Loss,
) -> tuple[Tensor, Tensor, Model, tuple[float, float]]:
    """Checked copies of x and y, the model with the normalisation inside, and the clip range."""
    check_callable("model", model, "a module or a function of images")
    check_callable("loss", loss, "a function (logits, y) -> loss of each sample")
    check_choice("norm", norm, ("linf", "l2"))
    if clip is not None:
        clip = check_numbers("clip", clip, 2)  # type: ignore[assignment]
    _check_batch(x, y)
    x, y = x.detach().clone(), y.detach().clone().long()
    low, high = (-torch.inf, torch.inf) if clip is None else clip
    if not low < high:
        raise ValueError(f"clip must be (low, high) with low < high, got {clip}")
    # an image computed back as x_norm * std + mean may miss the range by some roundings
    slack = 0.0 if clip is None else 4 * torch.finfo(x.dtype).eps * max(abs(low), abs(high))
    if not bool((torch.isfinite(x) & (x >= low - slack) & (x <= high + slack)).all()):
        raise ValueError(
            f"x must be finite and inside clip={clip}, got values in [{x.min().item():g}, "
            f"{x.max().item():g}]: give images before normalisation (and mean, std), or clip=None"
        )
    return x, y, _normalized(model, x, mean, std), (low, high)


def _check_batch(x: Tensor, y: Tensor) -> None:
    check_tensor("x", x)
    check_tensor("y", y, real=False)
    wrong_y = y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool
    if not x.is_floating_point() or x.ndim < 2 or wrong_y:
        raise ValueError(
            "x must be floating point of shape (B, ...) and y hold B integer classes, got "
            f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        )


def _normalized(model: Model, x: Tensor, mean: PerChannel, std: PerChannel) -> Model:
    if mean is None and std is None:
        return model
    given = (math.nan if v is None else v for v in (mean, std))  # one missing fails the test below
    shift, scale = (torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1) for v in given)
    fits = all(len(v) in (1, x.shape[1]) for v in (shift, scale))
    if not fits or not bool(torch.isfinite(shift).all() & (scale > 0).all()):
        raise ValueError(
            f"mean and std go together, finite, std positive, 1 or {x.shape[1]} numbers each (x "
            f"has shape {tuple(x.shape)}, channels second), got mean={mean}, std={std}"
        )
    shift, scale = (v.view(-1, *[1] * (x.ndim - 2)) for v in (shift, scale))
    return lambda z: model((z - shift) / scale)


def _gradient(f: Model, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = loss(_logits(f, x, y), y).sum()
        if not value.requires_grad:
            raise ValueError("the model's output does not depend differentiably on x")
        (g,) = torch.autograd.grad(value, x)
    if not bool(torch.isfinite(g).all()):
        raise ValueError("the gradient of the loss with respect to x is not finite")
    return g


def _logits(f: Model, x: Tensor, y: Tensor) -> Tensor:
    logits = f(x)
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] != len(x) or shape[1] < 2:
        raise ValueError(f"model must give logits ({len(x)}, classes >= 2), got shape {shape}")
    if bool(((y < 0) | (y >= shape[1])).any()):  # on a GPU cross-entropy would kill the process
        raise ValueError(f"y must be in 0..{shape[1] - 1}, got {y.min()}..{y.max()}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's logits are not finite (has its training diverged?)")
    return logits


def _steepest(g: Tensor, norm: str) -> Tensor:
    """Unit step by which a linear function of gradient g grows most: sign(g), g / |g|_2; 0 at 0."""
    if norm == "linf":
        return g.sign()
    flat, tiny = g.flatten(1), torch.finfo(g.dtype).tiny
    # scaled first: a confident network's gradient of 1e-30 is no zero, but its square is
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(tiny)
    return functional.normalize(flat, eps=tiny).view_as(g)


def _project(change: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "linf":
        return change.clamp(-eps, eps)
    flat, least = change.flatten(1), max(eps, torch.finfo(change.dtype).tiny)
    return (flat * (eps / flat.norm(dim=1, keepdim=True).clamp_min(least))).view_as(change)


def _uniform_in_unit_ball(x: Tensor, norm: str, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    draw = torch.empty(x.shape, dtype=x.dtype, device=device)
    if norm == "linf":
        return draw.uniform_(-1, 1, generator=generator).to(x.device)
    direction = _steepest(draw.normal_(generator=generator), "l2").flatten(1)
    volume = torch.empty_like(direction[:, :1]).uniform_(generator=generator)
    return (volume ** (1 / direction.shape[1]) * direction).view_as(x).to(x.device)
