"""Attacks that follow the gradient: one step, and many projected ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._arguments import check_callable, check_flag, check_integer, check_number
from .._evaluation import evaluation_mode
from .._steepest import steepest, unit
from ._common import (
    Clip,
    Loss,
    Model,
    Norm,
    PerChannel,
    check_generator,
    checked_logits,
    gradient,
    prepare,
    project,
)
from ._loss import margin, margin_loss


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
    loss: Loss = margin_loss,
) -> Tensor:
    """One step of length `eps` up the loss: x + eps sign(g) (linf) or x + eps g / |g|_2 (l2).

    In l2 g is without the components that point out of `clip`, which would use up the step. The
    result has shape, unit and dtype of `x`. Half precision: the attack computes in float32 and
    stays inside the ball there, the model sees its images rounded to their dtype, and so is the
    result, each entry at most half a spacing further away. One forward and one backward pass. A
    sample with zero gradient comes back as it was. Source: Goodfellow, Shlens, Szegedy, ICLR 2015.

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
        What is increased; the default makes the attack independent of the scale of the logits.
    """
    eps = check_number("eps", eps, low=0)
    check_callable("loss", loss, "a function (logits, y) -> loss of each sample")
    with torch.inference_mode(False), evaluation_mode(model):
        images = x
        x, y, f, box = prepare(model, x, y, norm, clip, mean, std, eps)
        z = (x + eps * steepest(gradient(f, loss, x, y), norm, x, box)).clamp(*box) if eps else x
        return z.to(images.dtype)


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int | None = None,
    random_start: bool = True,
    norm: Norm = "linf",
    clip: Clip = (0.0, 1.0),
    mean: PerChannel = None,
    std: PerChannel = None,
    generator: torch.Generator | None = None,
    loss: Loss = margin_loss,
) -> Tensor:
    """Projected gradient ascent in the ball of radius `eps` about `x`, worst of the restarts.

    The first run starts at `x` itself, each further one at a random point of the ball. Each step is
    fgsm's with `step_size`, then projected on the ball, then clipped (which only shortens it). Of
    the runs' last iterates each sample keeps one that fools the model, if any does, and among
    equals the largest margin max_{j != y} z_j - z_y of the logits. From equal generators, more
    restarts are never weaker. Source: Madry et al., ICLR 2018. Parameters not listed, and the
    result, are as for :func:`fgsm`.

    Parameters
    ----------
    step_size : float, optional
        None takes 2.5 eps / steps (Madry et al.): enough to cross the ball.
    restarts : int, optional
        Number of runs. None: 2, or 1 without random starts.
    random_start : bool
        False: one run, from `x`, without random numbers.
    generator : torch.Generator, optional
        Source of the starts; one on the CPU gives the same starts for every device of `x`. None
        takes torch's global one.
    """
    eps, steps = check_number("eps", eps, low=0), check_integer("steps", steps, low=1)
    check_flag("random_start", random_start)
    runs = 2 if random_start else 1
    if restarts is not None:
        runs = check_integer("restarts", restarts, low=1)
    length = check_number("step_size", 2.5 * eps / steps if step_size is None else step_size, low=0)
    check_callable("loss", loss, "a function (logits, y) -> loss of each sample")
    check_generator(generator)
    if runs > 1 and not random_start:
        raise ValueError(f"restarts must be 1 with random_start=False, got {restarts}")
    with torch.inference_mode(False), evaluation_mode(model):
        images = x
        x, y, f, box = prepare(model, x, y, norm, clip, mean, std, eps)
        worst, score = x.clone(), torch.full((len(x),), -math.inf, device=x.device)
        for run in range(runs if eps else 0):
            start = x
            if run:
                start = (x + eps * _uniform_in_unit_ball(x, norm, generator)).clamp(*box)
            z = ascend(f, loss, start, x, y, eps, norm, box, steps, length)
            if runs == 1:
                return z.to(images.dtype)
            with torch.no_grad():
                logits = checked_logits(f, z, y)
            found = margin(logits, y)
            # fooled ranks above not fooled even where two logits are equal
            floor = torch.where(logits.argmax(1) == y, -math.inf, torch.finfo(found.dtype).tiny)
            found, score = torch.maximum(found, floor.to(found)), score.to(found)
            worst[found > score] = z[found > score]
            score = torch.maximum(found, score)
        return worst.to(images.dtype)


def ascend(
    f: Model,
    loss: Loss,
    start: Tensor,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    box: tuple[float, float],
    steps: int,
    length: float,
    watch: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Steps of `length` up the loss, each projected on the ball; `watch` sees each point."""
    z = start
    for _ in range(steps):
        if watch is not None:
            watch(z)
        change = z + length * steepest(gradient(f, loss, z, y), norm, z, box) - x
        z = (x + project(change, eps, norm)).clamp(*box)
    if watch is not None:
        watch(z)
    return z


def _uniform_in_unit_ball(x: Tensor, norm: str, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    draw = torch.empty(x.shape, dtype=x.dtype, device=device)
    if norm == "linf":
        return draw.uniform_(-1, 1, generator=generator).to(x.device)
    direction = unit(draw.normal_(generator=generator)).flatten(1)
    volume = torch.empty_like(direction[:, :1]).uniform_(generator=generator)
    return (volume ** (1 / direction.shape[1]) * direction).view_as(x).to(x.device)
