"""Accuracy under attack, by the attacks of :mod:`lrmanifold.robustness` and of foolbox."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrmanifold.robustness import accuracy_under_attack, evaluation_mode, fgsm, pgd

Pair = tuple[Tensor, Tensor]
Curve = dict[str, float]


class _FastGradient:
    """FGSM at many strengths: the direction does not depend on the strength, find it once."""

    def __init__(self, norm: Any, clip: tuple[float, float] | None) -> None:
        self.norm, self.clip = norm, clip
        self._x: Tensor | None = None
        self._direction = torch.empty(0)

    def __call__(self, model: Any, x: Tensor, y: Tensor, eps: float) -> Tensor:
        if x is not self._x:
            step = fgsm(model, x, y, 1.0, clip=None, norm=self.norm) - x
            self._x, self._direction = x, step.round() if self.norm == "linf" else step
        z = x + eps * self._direction
        return z if self.clip is None else z.clamp(*self.clip)


def fast_gradient(
    model: nn.Module,
    pair: Pair,
    strengths: Sequence[float],
    *,
    norm: str = "linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> Curve:
    """FGSM at all strengths; `clip` None is the published tables' scaled version."""
    attack = _FastGradient(norm, clip)
    return _named(accuracy_under_attack(model, pair, attack, strengths, batch_size=256))


def projected_gradient(
    model: nn.Module,
    pair: Pair,
    strengths: Sequence[float],
    *,
    steps: int,
    restarts: int,
    norm: Literal["linf", "l2"] = "linf",
) -> Curve:
    """PGD with restarts: an image counts only if no restart fools the model at this or less.

    A smaller ball lies in the larger one, so images that are fooled already are not attacked again.
    Starts are seeded.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = pair
    found: Curve = {}
    with evaluation_mode(model):
        standing = _right(model, x, y, torch.arange(len(y), device=y.device))
        for eps in sorted(strengths):
            kept = []
            for part in standing.split(250):
                options: dict[str, Any] = {"steps": steps, "restarts": restarts, "norm": norm}
                z = pgd(model, x[part], y[part], eps, generator=generator, **options)
                kept.append(part[_right(model, z, y[part])])
            standing = torch.cat(kept)
            found[f"{eps:g}"] = len(standing) / len(y)
    return found


def _right(model: nn.Module, x: Tensor, y: Tensor, index: Tensor | None = None) -> Tensor:
    """Which images are classified rightly: a mask, or the chosen ones of `index`."""
    with torch.no_grad():
        mask = torch.cat([model(part).argmax(1) for part in x.split(500)]) == y
    return mask if index is None else index[mask]


def transferred(
    model: nn.Module, source: nn.Module, pair: Pair, strengths: Sequence[float], steps: int
) -> Curve:
    """PGD against `source` (a dense network with other weights), tried on `model`: black box."""

    def attack(_: Any, x: Tensor, y: Tensor, eps: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pgd(source, x, y, eps, steps=steps, generator=generator)

    return _named(accuracy_under_attack(model, pair, attack, strengths, batch_size=250))


def random_noise(model: nn.Module, pair: Pair, strengths: Sequence[float]) -> Curve:
    """Uniform noise of the attack's size: what strength alone does, without a gradient."""

    def attack(_: Any, x: Tensor, y: Tensor, eps: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        draw = 2 * torch.rand(x.shape, generator=generator).to(x) - 1
        return (x + eps * draw).clamp(0, 1)

    return _named(accuracy_under_attack(model, pair, attack, strengths, batch_size=512))


def masking(model: nn.Module, pair: Pair, eps: float) -> dict[str, Any]:
    """Would gradient masking show? Accuracy must level off with steps, and reach 0 without a limit.

    Returns accuracy for growing numbers of steps of PGD (linf, `eps`), at the unlimited strength 1
    (any image is allowed), under uniform noise of size `eps`, and the verdicts.
    """
    steps: Curve = {}
    for count in (1, 2, 5, 10, 20, 50, 100):
        curve = projected_gradient(model, pair, [eps], steps=count, restarts=1)
        steps[str(count)] = next(iter(curve.values()))
    unlimited = projected_gradient(model, pair, [1.0], steps=50, restarts=1)
    noise = random_noise(model, pair, [eps])
    last = next(iter(unlimited.values()))
    single = next(iter(fast_gradient(model, pair, [eps]).values()))
    return {
        "eps": eps,
        "images": len(pair[1]),
        "by_steps": steps,
        "levels_off": abs(steps["100"] - steps["20"]) <= 0.02,
        "one_step": single,
        "iterative_is_stronger": steps["20"] <= single + 0.005,
        "unlimited": last,
        "unlimited_success": last == 0.0,
        "noise": next(iter(noise.values())),
    }


def independent(model: nn.Module, pair: Pair, boundary_steps: int) -> dict[str, Any]:
    """foolbox's DeepFool (gradients) and boundary attack (decisions only), both l2.

    Returns the median distance to the nearest adversarial image that each found, over the images
    that are classified rightly, and the accuracy that remains at three radii.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # foolbox's own imports are older than this Python
        import foolbox
    x, y = pair
    device = next(model.parameters()).device
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=device)
    x, y = x.to(device), y.to(device)
    right = wrapped(x).argmax(1) == y
    found: dict[str, Any] = {"images": len(y), "right": int(right.sum())}
    attacks = {
        "deepfool_l2": foolbox.attacks.L2DeepFoolAttack(steps=50),
        "boundary_l2": foolbox.attacks.BoundaryAttack(steps=boundary_steps),
    }
    for name, attack in attacks.items():
        if name == "boundary_l2" and not boundary_steps:
            continue
        torch.manual_seed(0)
        distance = torch.full((len(y),), torch.inf)
        _, adversarial, success = attack(wrapped, x[right], y[right], epsilons=None)
        size = (adversarial - x[right]).flatten(1).norm(dim=1)
        distance[right.cpu()] = torch.where(success, size, torch.inf).cpu()
        distance[~right.cpu()] = 0.0
        found[name] = {
            "median_distance": float(distance[right.cpu()].median()),
            "accuracy": {
                f"{r:g}": float((distance > r).float().mean()) for r in (0.5, 1.0, 1.5, 2.0)
            },
            "success": float(success.float().mean()),
        }
    return found


def _named(found: dict[float, float]) -> Curve:
    return {f"{eps:g}": value for eps, value in found.items()}
