"""The attacks of pyautoattack, an independent package, behind our signature."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._common import Model, project
from ._loss import ordinary_factor

FOREIGN = ("apgd-ce", "apgd-t", "fab-t", "square")
LEAST_CLASSES = {"apgd-t": 4}  # the targeted DLR loss divides by a difference of four logits
Fold = Callable[[Tensor], Tensor]
_NORMS = {"linf": "Linf", "l2": "L2"}
_SMALLEST = 5  # Square in l2 tiles an image by fifths of its height
_log = logging.getLogger("lrmanifold.robustness")


def _our_pointer(record: logging.LogRecord) -> bool:
    """The package's messages name a file of its own repository that nobody has here."""
    record.msg = str(record.msg).replace(
        "See flags_doc.md for details", "See lrmanifold.robustness.check_masking"
    )
    return True


_log.addFilter(_our_pointer)


def require() -> None:
    """ImportError that says what to install, if pyautoattack is missing."""
    try:
        import pyautoattack  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the attacks 'apgd-ce', 'apgd-t', 'fab-t' and 'square' are those of the package "
            "pyautoattack, which is not installed: pip install 'lrmanifold[attacks]'"
        ) from error


def run(
    name: str,
    f: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    box: tuple[float, float],
    *,
    steps: int,
    queries: int,
    seed: int,
) -> Tensor:
    """Images of attack `name` on x, each inside the ball and the box, dtype of x.

    The package works in float32 on images in [0, 1] of shape (B, C, H, W), H, W >= 5, and seeds
    torch's global generator; here its results are projected, and the generator is given back.

    Square is stronger here than the package's default: the schedule of its sizes is scaled to
    `queries`, where the package tries small squares only after 1,000 of 10,000; its squares
    reach the last row and column, where the package's corners come from a range too short by one;
    and it goes on at a tie that is still classified rightly, where the package stops.
    """
    fold, unfold = _wider(*grid(x)) if name == "square" else grid(x)
    low, high = box
    width = high - low
    users = torch.get_default_dtype()
    with torch.no_grad():
        scale = ordinary_factor(f(x.clone())).median()
        classes = f(x[:1].clone()).shape[1]

    def predict(u: Tensor) -> Tensor:
        with default_dtype(users):
            z = f((low + width * unfold(u)).to(x.dtype)).float() * scale
            return _untied(z) if name == "square" else z

    attack = _attack(name, predict, eps / width, norm, x.device, classes, steps, queries, seed)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices), default_dtype(torch.float32):
        u = attack(fold(((x.float() - low) / width).clamp(0, 1)), y)
        z = (low + width * unfold(u)).to(x.dtype)
        z = torch.where(torch.isfinite(z), z, x)
        return (x + project(z - x, eps, norm)).clamp(*box)


def _untied(z: Tensor) -> Tensor:
    """Logits z in which of several largest ones the class that argmax gives is ahead."""
    top = z.amax(1, keepdim=True)
    below = z.nextafter(torch.full_like(z, -math.inf)).where(z == top, z)
    return below.scatter(1, z.argmax(1, keepdim=True), top)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The package makes tensors of torch's default dtype and mixes them with float32 images."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _attack(
    name: str,
    predict: Model,
    eps: float,
    norm: str,
    device: torch.device,
    classes: int,
    steps: int,
    queries: int,
    seed: int,
) -> Callable[[Tensor, Tensor], Tensor]:
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.square import SquareAttack

    common: dict[str, Any] = {"norm": _NORMS[norm], "eps": eps, "seed": seed, "device": device}
    targets = min(9, classes - 1)
    if name == "apgd-ce":
        attack = APGDAttack(predict, n_iter=steps, logger=_log, **common)
    elif name == "apgd-t":
        attack = APGDAttack_targeted(
            predict, n_iter=steps, n_target_classes=targets, logger=_log, **common
        )
    elif name == "fab-t":
        attack = _fab()(predict, n_iter=steps, targeted=True, n_target_classes=targets, **common)
    else:
        attack = SquareAttack(predict, n_queries=queries, resc_schedule=True, **common)
    return attack.perturb


def _fab() -> Any:
    """FAB with gradients of the images only: the package's would add to `.grad` of the model."""
    from pyautoattack.fab_pt import FABAttack_PT

    class FAB(FABAttack_PT):  # type: ignore[misc]
        def get_diff_logits_grads_batch_targeted(
            self, imgs: Tensor, la: Tensor, la_target: Tensor
        ) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                image = imgs.clone().requires_grad_()
                z = self.predict(image)
                change = (z.gather(1, la_target[:, None]) - z.gather(1, la[:, None]))[:, 0]
                (g,) = torch.autograd.grad(change.sum(), image)
            return change.detach()[:, None], g[:, None]

    return FAB


def grid(x: Tensor) -> tuple[Fold, Fold]:
    """x to images (B, C, H, W) that the package takes, and back."""
    if x.ndim == 4 and min(x.shape[2:]) >= _SMALLEST:
        return Tensor.contiguous, (lambda u: u)  # the package calls view
    size = math.prod(x.shape[1:])
    side = max(_SMALLEST, math.isqrt(size - 1) + 1)

    def fold(z: Tensor) -> Tensor:
        flat = z.flatten(1)
        # pixels that the model never sees
        rest = flat.new_full((len(flat), side * side - size), 0.5)
        return torch.cat((flat, rest), 1).view(-1, 1, side, side)

    return fold, lambda u: u.flatten(1)[:, :size].reshape(-1, *x.shape[1:])


def _wider(fold: Fold, unfold: Fold) -> tuple[Fold, Fold]:
    """The same with one row and one column more, which the model never sees."""

    def wider(z: Tensor) -> Tensor:
        return torch.nn.functional.pad(fold(z), (0, 1, 0, 1), value=0.5)

    # contiguous: a model may call view
    return wider, lambda u: unfold(u[..., :-1, :-1].contiguous())
