"""Accuracy under the worst of many attacks: the number to publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._arguments import (
    check_callable,
    check_choice,
    check_device,
    check_flag,
    check_instance,
    check_integer,
    check_number,
    shown,
)
from .._evaluation import evaluation_mode
from . import _autoattack
from ._attacks import pgd
from ._common import Clip, Data, Model, Norm, PerChannel, batches, prepare, right
from ._common import checked_logits as logits_of

ATTACKS = ("pgd", *_autoattack.FOREIGN)


@dataclass(frozen=True)
class WorstCase:
    """What :func:`worst_case` found on N samples.

    Attributes
    ----------
    eps, norm : float, str
        The ball.
    clean, accuracy : float
        Share of samples classified rightly without an attack, and under every attack.
    after : dict of str to float
        Accuracy that is left after each attack, in the order in which they ran.
    alone : dict of str to float
        Accuracy under each attack alone; empty unless asked for.
    robust : Tensor, shape (N,), bool, on the CPU
    fooled_by : tuple of str, N long
        The first attack that fools the sample, "clean" where none is needed, "" where none does.
    skipped : tuple of str
        Attacks that are not defined for so few classes.
    """

    eps: float
    norm: str
    clean: float
    accuracy: float
    after: dict[str, float]
    robust: Tensor = field(repr=False, compare=False)  # follows from `fooled_by`
    fooled_by: tuple[str, ...] = field(repr=False)
    alone: dict[str, float] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.norm} {self.eps:g}, {len(self.robust)} samples", "attack     left  alone"]
        lines.append(f"{'none':<8}{100 * self.clean:7.1f}")
        for name, left in self.after.items():
            alone = f"{100 * self.alone[name]:7.1f}" if name in self.alone else ""
            lines.append(f"{name:<8}{100 * left:7.1f}{alone}")
        lines.append(f"{'worst':<8}{100 * self.accuracy:7.1f}")
        return "\n".join(
            lines + [f"{name}: not defined for so few classes" for name in self.skipped]
        )


def worst_case(
    model: Model,
    data: Data,
    eps: float,
    *,
    norm: Norm = "linf",
    attacks: Sequence[str] = ATTACKS,
    steps: int = 100,
    restarts: int = 2,
    queries: int = 5000,
    individually: bool = False,
    clip: tuple[float, float] = (0.0, 1.0),
    mean: PerChannel = None,
    std: PerChannel = None,
    seed: int = 0,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> WorstCase:
    """Accuracy under the worst of several attacks: a sample is robust only if all of them fail.

    The attacks are our :func:`pgd` on the margin and those of AutoAttack's standard version, from
    the independent package `pyautoattack` (``pip install 'lrmanifold[attacks]'``): APGD on cross
    entropy, targeted APGD on the DLR loss, targeted FAB, and Square, which uses no gradient; its
    sizes are scaled to `queries` and its squares reach every pixel, which makes it stronger than by
    the package's defaults. Each runs on what the ones before left. Every image found is projected
    on the ball and the clip range, and tried on the model here: nothing is believed. Logits whose
    spread is not ordinary are rescaled by a power of two, as in :func:`margin_loss`; the package's
    cross entropy saturates.

    The result is an upper bound of the true robust accuracy, the best known in practice, and no
    proof; a proof is :func:`lrmanifold.certify.verified_accuracy`. Models that draw random numbers
    need attacks on their expectation, which are not here. The package attacks in float32; images in
    half precision are changed in float32 too, and the model sees them rounded. Cost for
    ten classes: about 21 `steps` forward and backward passes and `queries` forward passes of the
    samples that stand. Source: Croce, Hein, ICML 2020.

    Parameters
    ----------
    model, data, mean, std, batch_size, device
        As for :func:`accuracy_under_attack`. The model must give floating point logits.
    eps : float
    attacks : names out of "pgd", "apgd-ce", "apgd-t", "fab-t", "square"
        In the order in which they run. "apgd-t" needs 4 classes and is skipped for fewer.
    steps, queries : int
        Steps of the attacks with gradients, and evaluations that Square may use for a sample.
    restarts : int
        Of "pgd"; the others start once.
    individually : bool
        Run each attack on all samples that are classified rightly, and fill `alone`. The worst case
        can be lower for it: attacks meet samples that they would not have met.
    clip : (low, high)
        The range of valid images.
    seed : int
        Of all random starts. torch's global generator is left as it was.

    Raises
    ------
    ImportError
        If an attack of `pyautoattack` is asked for and the package is missing.
    ValueError
        If no attack that is asked for is defined for so few classes.
    """
    check_callable("model", model, "a module or a function of images")
    eps = check_number("eps", eps, low=0)
    check_choice("norm", norm, ("linf", "l2"))
    names = _names(attacks)
    steps, restarts, queries, seed, size = (
        check_integer("steps", steps, low=1),
        check_integer("restarts", restarts, low=1),
        check_integer("queries", queries, low=1),
        check_integer("seed", seed, low=0, high=2**62),
        check_integer("batch_size", batch_size, low=1),
    )
    check_flag("individually", individually)
    check_device("device", device)
    check_clip(clip)
    if any(name in _autoattack.FOREIGN for name in names):
        _autoattack.require()
    clean, skipped = 0, set()
    fooled_by: list[str] = []
    alone = dict.fromkeys(names, 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), evaluation_mode(model):
        for batch in batches(data, size, model, device):
            x, y, f, box = prepare(model, *batch, norm, clip, mean, std, eps)
            x = x.clamp(*box)  # what rounding in half precision may miss the range by
            with torch.no_grad():
                classes = logits_of(f, x, y).shape[1]
            stands = right(f, x, y)
            begin = stands.clone()
            by = ["" if ok else "clean" for ok in stands.tolist()]
            clean += int(stands.sum())
            for name in names:
                if classes < _autoattack.LEAST_CLASSES.get(name, 2):
                    skipped.add(name)
                    continue
                tried = (begin if individually else stands).nonzero()[:, 0]
                if not len(tried) or not eps:
                    continue
                part, its = x[tried], y[tried]
                if name == "pgd":
                    z = pgd(
                        f, part, its, eps, steps=steps, restarts=restarts, norm=norm, clip=clip,
                        generator=generator,
                    )  # fmt: skip
                else:
                    z = _autoattack.run(
                        name, f, part, its, eps, norm, box, steps=steps, queries=queries, seed=seed
                    )
                fooled = tried[~right(f, z, its)]
                alone[name] += len(fooled)
                for index in fooled.tolist():
                    by[index] = by[index] or name
                stands[fooled] = False
            fooled_by += by
    total = len(fooled_by)
    if not total:
        raise ValueError("nothing to measure: 0 samples")
    ran = [name for name in names if name not in skipped]
    if not ran:  # the clean accuracy is no worst case
        raise ValueError(f"attacks: none of {names} is defined for so few classes as {classes}")
    after, left = {}, clean
    for name in ran:
        left -= fooled_by.count(name)
        after[name] = left / total
    return WorstCase(
        eps, norm, clean / total, left / total, after,
        torch.tensor([name == "" for name in fooled_by]), tuple(fooled_by),
        {name: (clean - alone[name]) / total for name in ran} if individually else {},
        tuple(name for name in names if name in skipped),
    )  # fmt: skip


def check_clip(clip: Clip) -> None:
    if clip is None:
        raise ValueError("clip must be (low, high), got None: these attacks need a range of images")


def _names(attacks: Sequence[str]) -> list[str]:
    check_instance("attacks", attacks, (list, tuple), f"names out of {', '.join(ATTACKS)}")
    names = [check_choice("attacks", name, ATTACKS) for name in attacks]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"attacks must be different names out of {ATTACKS}, got {shown(attacks)}")
    return names
