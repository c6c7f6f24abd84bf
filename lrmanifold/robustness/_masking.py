"""Do gradients mislead the attacks? Checks that a masked model fails."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._arguments import check_callable, check_choice, check_device, check_integer, check_number
from .._evaluation import evaluation_mode
from . import _autoattack
from ._attacks import ascend, fgsm, pgd
from ._climb import climb
from ._common import Data, Model, Norm, PerChannel, batches, gradient, prepare, right
from ._common import checked_logits as logits_of
from ._loss import margin, margin_loss, ordinary_factor
from ._worst_case import check_clip


@dataclass(frozen=True)
class Masking:
    """What :func:`check_masking` found. All shares are of the samples.

    Attributes
    ----------
    samples, eps, norm, tolerance
        What was asked.
    path : tuple of float, steps + 1 long
        Mean of max_{j != y} z_j - z_y of the rightly classified samples along PGD's path from x.
    zero_gradient : float
        Share with a gradient of exactly 0 at x.
    one_step, many_steps, unlimited : float
        Accuracy under FGSM, under PGD, and under PGD where any valid image is allowed.
    black_box : dict of int to float
        Accuracy under Square, which uses no gradient, for growing numbers of evaluations; each
        number is a run of its own on what the ones before left.
    only_black_box : float
        Share that Square fools and PGD does not.
    climbed : float
        Accuracy under PGD and, where it fails, a search without gradients from where it ended.
    """

    samples: int
    eps: float
    norm: str
    tolerance: float
    path: tuple[float, ...]
    zero_gradient: float
    one_step: float
    many_steps: float
    unlimited: float
    black_box: dict[int, float]
    only_black_box: float
    climbed: float

    @property
    def verdicts(self) -> dict[str, bool]:
        """Each check by name: True where nothing speaks for masked gradients."""
        rise = max(self.path) - self.path[0]
        tenth = self.path[-1 - max(1, (len(self.path) - 1) // 10)]
        budgets = list(self.black_box.values())
        most = _with_rounding(self.tolerance)
        return {
            "gradients do not vanish": self.zero_gradient <= most,
            "the loss rises along the path": rise > 0
            and self.path[-1] >= max(self.path) - 0.05 * rise,
            "the loss levels off": abs(self.path[-1] - tenth) <= 0.05 * max(rise, 0.0),
            "many steps are as strong as one": self.many_steps - self.one_step <= most,
            "without a limit all are fooled": self.unlimited == 0,
            "the black box has converged": len(budgets) > 2 and budgets[-3] - budgets[-1] <= most,
            "the black box is not stronger": self.only_black_box <= most,
            "no search improves on many steps": self.many_steps - self.climbed <= most,
        }

    @property
    def passed(self) -> bool:
        return all(self.verdicts.values())

    def __str__(self) -> str:
        box = ", ".join(f"{100 * a:.1f} ({q} queries)" for q, a in self.black_box.items())
        lines = [
            f"{self.norm} {self.eps:g}, {self.samples} samples",
            f"one step {100 * self.one_step:.1f}, many steps {100 * self.many_steps:.1f}, "
            f"no limit {100 * self.unlimited:.1f}",
            f"black box {box}; fooled by it alone {100 * self.only_black_box:.1f}",
            f"many steps and a search without gradients from there {100 * self.climbed:.1f}",
            f"margin along the path {self.path[0]:.3g} to {self.path[-1]:.3g}; "
            f"zero gradients {100 * self.zero_gradient:.1f}",
        ]
        return "\n".join(
            lines + [f"{'yes' if ok else 'NO':<4}{name}" for name, ok in self.verdicts.items()]
        )


def _with_rounding(tolerance: float) -> float:
    """Differences of shares are inexact: 2 of 100 samples must not pass here and fail there."""
    return tolerance + 1e-9


def check_masking(
    model: Model,
    data: Data,
    eps: float,
    *,
    norm: Norm = "linf",
    steps: int = 100,
    queries: int = 8000,
    tolerance: float = 0.02,
    clip: tuple[float, float] = (0.0, 1.0),
    mean: PerChannel = None,
    std: PerChannel = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Masking:
    """Signs of masked gradients, that is of attacks that fail where the model is not robust.

    Checks that the loss rises along PGD's path and levels off; that gradients are not zero; that
    many steps do not do worse than one; that accuracy falls to 0 where any image is allowed; and
    that two attacks without gradients fool nothing that PGD cannot. One is Square, with squares
    that reach all pixels; its budget is doubled from 250 evaluations, each time a whole schedule of
    sizes with other random numbers, until two doublings together change at most `tolerance`. It
    starts afresh and can be much weaker than PGD, in l2 above all; alone it would notice little.
    The other is a random search from where PGD ended, so never weaker than PGD, with as many
    evaluations as Square's last run. Passing all is necessary, not sufficient. A few hundred
    samples are enough; needs `pyautoattack`. Source: Athalye, Carlini, Wagner, ICML 2018; Carlini
    et al., arXiv 1902.06705.

    Parameters
    ----------
    queries : int
        Most evaluations of Square in one run for a sample, at least 1,000: three budgets.
    tolerance : float
        Share of the samples by which accuracies may differ before a check fails.

    Other parameters are those of :func:`worst_case`.
    """
    check_callable("model", model, "a module or a function of images")
    eps = check_number("eps", eps, low=0, open_low=True)
    check_choice("norm", norm, ("linf", "l2"))
    steps, queries = (
        check_integer("steps", steps, low=1),
        check_integer("queries", queries, low=1000),
    )
    tolerance = check_number("tolerance", tolerance, low=0)
    seed = check_integer("seed", seed, low=0, high=2**62)
    size = check_integer("batch_size", batch_size, low=1)
    check_device("device", device)
    check_clip(clip)
    _autoattack.require()
    sums = dict.fromkeys(("zero", "one", "many", "unlimited", "samples", "right"), 0)
    ends = []  # of each batch: what the black box gets, where PGD ended, and what it left
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), evaluation_mode(model):
        path = torch.zeros(steps + 1, dtype=torch.float64)
        for batch in batches(data, size, model, device):
            x, y, f, box = prepare(model, *batch, norm, clip, mean, std, eps)
            x = x.clamp(*box)  # what rounding in half precision may miss the range by
            width = box[1] - box[0]
            whole = width if norm == "linf" else width * math.sqrt(math.prod(x.shape[1:]))
            options: dict[str, Any] = {"norm": norm, "clip": clip}
            sums["samples"] += len(x)
            chosen = right(f, x, y)
            x, y = x[chosen], y[chosen]
            if not len(x):
                continue
            sums["right"] += len(x)
            sums["zero"] += int((gradient(f, margin_loss, x, y).flatten(1) == 0).all(1).sum())
            sums["one"] += int(right(f, fgsm(f, x, y, eps, **options), y).sum())
            path += _path(f, x, y, eps, norm, box, steps)
            options |= {"steps": steps, "generator": generator}
            end = pgd(f, x, y, eps, **options)
            safe = right(f, end, y)
            sums["many"] += int(safe.sum())
            far = pgd(f, x, y, whole, **options)
            sums["unlimited"] += int(right(f, far, y).sum())
            ends.append((f, x, y, box, end, safe))
        total = sums["samples"]
        if not sums["right"]:
            raise ValueError(f"nothing to measure: {total} samples, none classified rightly")
        black_box: dict[int, float] = {}
        stands = [torch.ones_like(safe) for *_, safe in ends]
        budget = 250
        while True:
            for (f, x, y, box, *_), left in zip(ends, stands, strict=True):
                tried = left.nonzero()[:, 0]
                if not len(tried):
                    continue
                z = _autoattack.run(
                    "square", f, x[tried], y[tried], eps, norm, box, steps=1, queries=budget,
                    seed=seed + len(black_box),
                )  # fmt: skip
                left[tried] = right(f, z, y[tried])
            black_box[budget] = sum(int(left.sum()) for left in stands) / total
            last = list(black_box.values())[-3:]
            # one doubling without a change may be chance
            if budget * 2 > queries or (
                len(last) == 3 and last[0] - last[2] <= _with_rounding(tolerance)
            ):
                break
            budget *= 2
        only, climbed = 0, 0
        for (f, x, y, box, end, safe), left in zip(ends, stands, strict=True):
            only += int((safe & ~left).sum())
            if safe.any():
                pair = (x[safe], y[safe])
                z = climb(f, end[safe], *pair, eps, norm, box, budget, generator)
                climbed += int(right(f, z, pair[1]).sum())
    shares = {name: count / total for name, count in sums.items()}
    return Masking(
        total, eps, norm, tolerance, tuple((path / sums["right"]).tolist()), shares["zero"],
        shares["one"], shares["many"], shares["unlimited"], black_box, only / total,
        climbed / total,
    )  # fmt: skip


def _path(
    f: Model,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str,
    box: tuple[float, float],
    steps: int,
) -> Tensor:
    """Sum over samples of the margin at each point of PGD's path, logits of ordinary spread."""
    found: list[float] = []
    with torch.no_grad():
        factor = ordinary_factor(logits_of(f, x, y).float())

    def watch(z: Tensor) -> None:
        with torch.no_grad():
            found.append(float((factor * margin(logits_of(f, z, y), y)).sum()))

    ascend(f, margin_loss, x, x, y, eps, norm, box, steps, 2.5 * eps / steps, watch)
    return torch.tensor(found, dtype=torch.float64)
