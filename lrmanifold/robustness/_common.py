"""What every attack needs: checked arguments, normalisation inside the model, gradients of x."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._arguments import (
    check_callable,
    check_choice,
    check_instance,
    check_numbers,
    check_tensor,
    shown,
)
from .._evaluation import check_output, module_of
from .._stack import stack_level
from ..precision import compute_dtype

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Norm = Literal["linf", "l2"]
Clip = tuple[float, float] | None
PerChannel = float | Sequence[float] | Tensor | None
Data = Iterable[tuple[Tensor, Tensor]] | tuple[Tensor, Tensor]


def prepare(
    model: Model,
    x: Tensor,
    y: Tensor,
    norm: str,
    clip: Clip,
    mean: PerChannel,
    std: PerChannel,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Model, tuple[float, float]]:
    """Checked copies of x and y, the model with the normalisation inside, and the clip range.

    Images in half precision become float32, as a step may be shorter than their spacing; the model
    gets them rounded to their own dtype. Warns of an `eps` with which every image may become every
    other.
    """
    check_callable("model", model, "a module or a function of images")
    check_choice("norm", norm, ("linf", "l2"))
    if clip is not None:
        clip = check_numbers("clip", clip, 2)  # type: ignore[assignment]
    check_batch(x, y)
    x, y = x.detach().clone(), y.detach().clone().long()
    low, high = (-torch.inf, torch.inf) if clip is None else clip
    if not low < high:
        raise ValueError(f"clip must be (low, high) with low < high, got {clip}")
    # an image computed back as x_norm * std + mean may miss the range by some roundings
    slack = 0.0 if clip is None else 4 * torch.finfo(x.dtype).eps * max(abs(low), abs(high))
    if not bool(((x >= low - slack) & (x <= high + slack)).all()):
        raise ValueError(
            f"x must be inside clip={clip}, got values in [{x.min().item():g}, "
            f"{x.max().item():g}]: give images before normalisation (and mean, std), or clip=None"
        )
    widest = (high - low) * (math.sqrt(x[0].numel()) if norm == "l2" and len(x) else 1.0)
    if eps > widest:
        warnings.warn(
            f"eps = {eps:g} lets every image become every other: their values are in "
            f"[{low:g}, {high:g}] (clip). Give eps in that unit, such as {eps:g} / 255",
            stacklevel=stack_level(),
        )
    given, wide = x.dtype, compute_dtype(x.dtype)
    seen = normalized(model, x, mean, std)
    f = seen if wide == given else lambda z: seen(z.to(given))
    return x.to(wide), y, f, (low, high)


def check_batch(x: Tensor, y: Tensor) -> None:
    check_tensor("x", x)
    check_tensor("y", y, real=False)
    wrong_y = y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool
    if not x.is_floating_point() or x.ndim < 2 or wrong_y:
        raise ValueError(
            "x must be floating point of shape (B, ...) and y hold B integer classes, got "
            f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x must be finite, got NaN or Inf")


def batches(
    data: Data, size: int, model: Model, device: torch.device | str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Checked pairs (x, y) on the device of the model, y in int64, of two tensors or of batches."""
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise TypeError(f"data must be (x, y) or batches of it, got {shown(data)}")
    module = module_of(model)
    if device is None and isinstance(module, nn.Module):
        device = next((p.device for p in module.parameters()), None)
    pairs: Any = data
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor):
        check_batch(*data)
        pairs = zip(data[0].split(size), data[1].split(size), strict=True)
    for batch in pairs:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"data must give pairs (x, y), got {shown(batch)}")
        x, y = batch
        check_batch(x, y)
        yield x.to(device), y.to(device).long()  # uint8 knows no class 256


def normalized(model: Model, x: Tensor, mean: PerChannel, std: PerChannel) -> Model:
    if mean is None and std is None:
        return model
    given = (math.nan if v is None else v for v in (mean, std))  # one missing fails the test below
    try:
        # cloned: tensors that were made in inference mode
        shift, scale = (
            torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1).clone() for v in given
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"mean and std must be numbers, got mean={shown(mean)}, std={shown(std)}"
        ) from error
    fits = all(len(v) in (1, x.shape[1]) for v in (shift, scale))
    if not fits or not bool(torch.isfinite(shift).all() & (scale > 0).all()):
        raise ValueError(
            f"mean and std go together, finite, std positive in {x.dtype}, 1 or {x.shape[1]} "
            f"numbers each (x has shape {tuple(x.shape)}, channels second), got mean={mean}, "
            f"std={std}"
        )
    shift, scale = (v.view(-1, *[1] * (x.ndim - 2)) for v in (shift, scale))
    return lambda z: model((z - shift) / scale)


def gradient(f: Model, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """Of the loss of each sample, up to a positive factor that all share."""
    for factor in (1.0, 2.0**-12):  # inside a model in float16 the first may overflow
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = loss(checked_logits(f, x, y), y)
            if not isinstance(value, Tensor):
                raise TypeError(f"loss must return a tensor (B,) or a scalar, got {shown(value)}")
            # unused: the weights have gradients, the images have none
            g = None
            if value.requires_grad:
                (g,) = torch.autograd.grad(factor * value.sum(), x, allow_unused=True)
        if g is None:
            raise ValueError("the model's output does not depend differentiably on x")
        if bool(torch.isfinite(g).all()):
            return g
    raise ValueError("the gradient of the loss with respect to x is not finite")


def checked_logits(f: Model, x: Tensor, y: Tensor) -> Tensor:
    logits = check_output(f(x.clone()))  # a model may write into what it is given
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[0] != len(x) or shape[1] < 2:
        one = ": of one logit z make two by cat((-z, z), 1) / 2" if shape == (len(x), 1) else ""
        raise ValueError(f"model must give logits ({len(x)}, classes >= 2), got shape {shape}{one}")
    if not logits.is_floating_point():
        raise TypeError(f"model must give logits of a floating point dtype, got {logits.dtype}")
    if bool(((y < 0) | (y >= shape[1])).any()):  # on a GPU cross-entropy would kill the process
        raise ValueError(f"y must be in 0..{shape[1] - 1}, got {y.min()}..{y.max()}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's logits are not finite (has its training diverged?)")
    return logits


def right(f: Model, x: Tensor, y: Tensor) -> Tensor:
    """Which samples are classified rightly, shape (B,), bool."""
    with torch.no_grad():
        return checked_logits(f, x, y).argmax(1) == y


def project(change: Tensor, eps: float, norm: str) -> Tensor:
    """The nearest change inside the ball of radius eps."""
    if norm == "linf":
        return change.clamp(-eps, eps)
    flat, least = change.flatten(1), max(eps, torch.finfo(change.dtype).tiny)
    return (flat * (eps / flat.norm(dim=1, keepdim=True).clamp_min(least))).view_as(change)


def check_generator(generator: Any) -> None:
    if generator is not None:
        check_instance("generator", generator, torch.Generator, "a torch.Generator")
