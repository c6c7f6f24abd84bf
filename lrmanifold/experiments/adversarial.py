"""Adversarial training: losses on images that an attack on the present network finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import (
    check_choice,
    check_instance,
    check_integer,
    check_number,
    shown,
)
from .._evaluation import check_output, evaluation_mode, module_of
from .._steepest import steepest
from ..precision import compute_dtype
from .data import check_images

KINDS = ("pgd", "trades", "single")
NORMS = ("linf", "l2")


@dataclass(frozen=True)
class Adversarial:
    """How images are changed in training, in a ball about them and within [0, 1].

    Attributes
    ----------
    eps : float
        Radius at the end; at most 1 in linf, as images are in [0, 1]: 8/255, not 8.
    norm : {"linf", "l2"}
    kind : {"pgd", "trades", "single"}
        "pgd": cross entropy on the images that PGD finds from a random start (Madry et al., ICLR
        2018). "trades": cross entropy on the images plus `beta` times the divergence of the
        predictions on those that PGD finds for it (Zhang et al., ICML 2019, equation 5). "single":
        one step of 1.25 `eps` from a random start (Wong et al., ICLR 2020), the cheapest; it may
        overfit to one step: look at the accuracy under PGD.
    steps : int
        Of PGD, each of 2.5 eps / steps.
    beta : float
    ramp : float
        Share of the training over which the radius grows from 0, linearly. Without it training may
        stay at chance, at large radii and rates.

    Raises
    ------
    TypeError, ValueError
        For a value of the wrong type or out of range.
    """

    eps: float
    norm: str = "linf"
    kind: str = "pgd"
    steps: int = 7
    beta: float = 6.0
    ramp: float = 0.3

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "eps": check_number("eps", self.eps, low=0.0, open_low=True),
            "norm": check_choice("norm", self.norm, NORMS),
            "kind": check_choice("kind", self.kind, KINDS),
            "steps": check_integer("steps", self.steps, low=1),
            "beta": check_number("beta", self.beta, low=0.0),
            "ramp": check_number("ramp", self.ramp, low=0.0, high=1.0),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(
                f"eps must be at most 1 (linf), as pixels are in 0..1, got {self.eps:g}: is "
                f"{self.eps:g}/255 = {self.eps / 255:.4g} meant?"
            )


class AdversarialLoss:
    """The loss of :func:`~lrmanifold.experiments.training.fit` for adversarial training.

    The attack sees the network in evaluation mode, so that batch norm's averages come from the
    images of the loss alone; its gradients reach no parameter. Random starts depend on the seed,
    the place in the training and the device only: a run that was cut off goes on alike.

    A call checks the images and is :meth:`loss` with :meth:`radius` and :meth:`start`. These two
    change with the step, so a captured step (:mod:`~lrmanifold.experiments.replay`) takes them as
    arguments and calls :meth:`loss`; `fit` does so.

    Parameters
    ----------
    how : Adversarial
    steps : int
        Batches of the whole training.
    seed : int
    label_smoothing : float
        Of the cross entropy.
    done : int
        Batches of the whole training before the first one here, if it has several parts.

    Raises
    ------
    TypeError, ValueError
        For a value of the wrong type or out of range.
    """

    def __init__(
        self,
        how: Adversarial,
        steps: int,
        *,
        seed: int = 0,
        label_smoothing: float = 0.0,
        done: int = 0,
    ) -> None:
        self.how: Adversarial = check_instance("how", how, Adversarial, "an Adversarial")
        self.steps = check_integer("steps", steps, low=1)
        self.seed = check_integer("seed", seed)
        self.smoothing = check_number("label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.done = check_integer("done", done, low=0)
        self._seen = False

    def __repr__(self) -> str:
        return (
            f"AdversarialLoss({self.how}, {self.steps}, seed={self.seed}, "
            f"label_smoothing={self.smoothing}, done={self.done})"
        )

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, step: int) -> Tensor:
        """Mean loss of images (B, C, H, W) after `step` batches.

        Raises TypeError for a model that is no module and for images of integers, and ValueError
        for images outside [0, 1]: give them before normalisation, which belongs into the model. On
        an accelerator only the first batch is looked at, as the host would wait for each.
        """
        check_integer("step", step, low=0)
        if not isinstance(module_of(model), nn.Module):
            raise TypeError(
                f"model must be a module, got {shown(model)}: the attack runs it in evaluation "
                "mode, which a function does not have"
            )
        if not (self._seen and x.device.type != "cpu"):
            check_images("x", x)
            self._seen = True
        return self.loss(model, x, y, self.radius(step), self.start(x, step))

    def radius(self, step: int) -> float:
        """The radius for the batch after `step` others: eps, or less while it grows."""
        grown = round(self.how.ramp * self.steps)
        return self.how.eps * min(1.0, (self.done + step + 1) / grown) if grown else self.how.eps

    def start(self, x: Tensor, step: int) -> Tensor:
        """Random starts of shape (B, C, H, W) in the unit ball of the norm, on the device of `x`.

        They are multiplied by the radius. The CPU and CUDA draw different ones.
        """
        generator = torch.Generator(x.device)
        generator.manual_seed((7_919 * (self.done + step) + self.seed + 1) % 2**63)
        return _start(x, self.how.norm, generator)

    def loss(
        self, model: nn.Module, x: Tensor, y: Tensor, eps: float | Tensor, start: Tensor
    ) -> Tensor:
        """Mean loss on the images that the attack finds.

        Parameters
        ----------
        model : nn.Module
            In training mode, as for any loss.
        x : Tensor, shape (B, C, H, W)
            In [0, 1].
        y : Tensor, shape (B,)
        eps : float or Tensor, shape ()
        start : Tensor, shape of `x`
            In the unit ball, as from :meth:`start`.

        Returns
        -------
        Tensor, shape ()
        """
        how = self.how
        z = self.attacked(model, x, y, eps, start)
        if how.kind != "trades":
            return F.cross_entropy(logits_of(model, z), y, label_smoothing=self.smoothing)
        clean, found = logits_of(model, torch.cat((x, z))).chunk(2)
        apart = _divergence(found, clean.log_softmax(1))
        return F.cross_entropy(clean, y, label_smoothing=self.smoothing) + how.beta * apart

    def attacked(
        self, model: nn.Module, x: Tensor, y: Tensor, eps: float | Tensor, start: Tensor
    ) -> Tensor:
        """Images (B, C, H, W) at most `eps` from `x` that the network finds hard, without gradient.

        The attack starts at x + eps `start`; arguments as in :meth:`loss`. Images in half precision
        are attacked in float32, and what is found is rounded.
        """
        how, given = self.how, x.dtype
        x, start = (t.detach().to(compute_dtype(given)) for t in (x, start))
        count = 1 if how.kind == "single" else how.steps
        length = (1.25 if how.kind == "single" else 2.5 / count) * eps
        with torch.inference_mode(False), evaluation_mode(model):
            # made in inference mode, they could not be differentiated
            x, y, start = (t.clone() if t.is_inference() else t for t in (x, y, start))
            target = None
            if how.kind == "trades":
                target = logits_of(model, x.to(given).clone()).log_softmax(1).detach()
            z = _project(x, start * eps, eps, how.norm)
            for _ in range(count):
                with torch.enable_grad():
                    z.requires_grad_()
                    # a copy: a model may write into what it is given
                    logits = logits_of(model, z.to(given).clone())
                    # sums: each image's gradient is its own
                    loss = (
                        F.cross_entropy(logits, y, reduction="sum")
                        if target is None
                        else _divergence(logits, target) * len(y)
                    )
                    (g,) = torch.autograd.grad(loss, z)
                z = z.detach()
                z = _project(
                    x, z + length * steepest(g, how.norm, z, (0.0, 1.0)) - x, eps, how.norm
                )
        return z.to(given)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """What a model gives, if it is logits alone, in float32."""
    instead = "wrap it in an nn.Module that returns the logits alone"
    return check_output(model(x), instead=instead).float()


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images of KL(target, softmax(logits)); target is given by its logarithm."""
    return F.kl_div(logits.log_softmax(1), target, reduction="batchmean", log_target=True)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def _start(x: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    """Uniform in the unit ball; for l2 a uniform direction at a uniform distance."""
    drawn: dict[str, Any] = {
        "generator": generator,
        "device": x.device,
        "dtype": torch.float32,  # whatever torch's default is
    }
    if norm == "linf":
        return (2 * torch.rand(x.shape, **drawn) - 1).to(x)
    draw = torch.randn(x.shape, **drawn)
    share = torch.rand(len(x), *[1] * (x.ndim - 1), **drawn)
    return (share * draw / _flat(draw)).to(x)


def _project(x: Tensor, change: Tensor, eps: float | Tensor, norm: str) -> Tensor:
    """x + change within the ball and [0, 1]; the second only shortens the change."""
    if norm == "linf":
        change = change.clamp(-eps, eps)  # type: ignore[arg-type]
    else:
        # the smallest number for radius 0: no division by 0
        length = _flat(change).clamp_min(torch.finfo(change.dtype).tiny)
        change = change * (eps / torch.maximum(length, torch.zeros_like(length) + eps))
    return (x + change).clamp(0, 1)
