"""Training for certificates: logits of the worst case that the bound allows, and losses on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._arguments import (
    check_choice,
    check_instance,
    check_integer,
    check_number,
    check_tensor,
    shown,
)
from ._labels import check_labels
from .lipschitz import LipschitzBound

Kind = Literal["cross_entropy", "trades", "emma"]


def worst_case_logits(
    model_or_bound: nn.Module | LipschitzBound, logits: Tensor, y: Tensor, eps: float | Tensor
) -> Tensor:
    r"""Logits that the rival classes cannot exceed within `eps`, relative to the true class's.

    :math:`z_j + \epsilon L \|w_y - w_j\|` for j ≠ y, and :math:`z_y` itself: if y is still the
    largest the sample is safe, up to what training leaves out of L (rounding, and power iterations
    that find dense norms from below); :func:`radius` proves it. Differentiable in the logits and,
    through L and w, in every weight, so that a network learns to be smooth where it needs to be.

    Parameters
    ----------
    model_or_bound : nn.Module or LipschitzBound
        A model is followed anew at each call: make a :class:`LipschitzBound` once for a training
        loop, or where bounds need the shape of the input.
    logits : Tensor, shape (B, classes)
        The network's.
    y : Tensor, shape (B,)
        Classes, integers.
    eps : float or Tensor, shape (), (B,) or (B, classes)
        At least 0. Of tensors on an accelerator, which is not waited for, no number is looked at.

    Returns
    -------
    Tensor, shape (B, classes)
    """
    kinds = (nn.Module, LipschitzBound)
    check_instance("model_or_bound", model_or_bound, kinds, "an nn.Module or a LipschitzBound")
    check_tensor("logits", logits)
    check_tensor("y", y, real=False)
    if not isinstance(eps, Tensor):
        eps = check_number("eps", eps, low=0)
    elif eps.shape not in (torch.Size(()), logits.shape[:1], logits.shape):
        wanted = f"(), {tuple(logits.shape[:1])} or {tuple(logits.shape)}"
        raise ValueError(f"eps must have shape {wanted}, got {shown(eps)}")
    elif eps.device.type == "cpu" and not bool((eps >= 0).all()):
        raise ValueError(f"eps must be at least 0, got {float(eps.min())}")
    return logits + _slack(model_or_bound, logits, y) * _column(eps)


def _column(eps: float | Tensor) -> float | Tensor:
    return eps[:, None] if isinstance(eps, Tensor) and eps.ndim == 1 else eps


def _slack(model_or_bound: nn.Module | LipschitzBound, logits: Tensor, y: Tensor) -> Tensor:
    """L ‖w_y - w_j‖ for each sample and class, 0 at the true one; (B, classes)."""
    bound = model_or_bound
    if isinstance(bound, nn.Module):
        bound = LipschitzBound(bound)
    if logits.ndim != 2 or y.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (B, classes) and y (B,), got {tuple(logits.shape)}, {tuple(y.shape)}"
        )
    check_labels(y, len(logits), logits.shape[1], wait=False)
    total, body, W = bound.evaluate()
    if W is not None and len(W) != logits.shape[1]:
        raise ValueError(
            f"logits must be of the network's {len(W)} classes, got shape {tuple(logits.shape)}"
        )
    classes = torch.arange(logits.shape[1], device=logits.device)
    others = (classes != y[:, None]).to(logits.dtype)
    if W is None:
        return math.sqrt(2.0) * total * others
    # the derivative of a root at 0, where a class meets itself, is infinite
    square = (W[:, None] - W[None]).square().sum(-1)
    gaps = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
    return body * gaps.index_select(0, y) * others


class CertifiedLoss(nn.Module):
    r"""A loss whose minimum is a network with certificates of radius `eps`.

    ``cross_entropy``: of the worst-case logits. ``trades``: cross entropy of the logits plus
    `weight` times the Kullback-Leibler divergence to the worst-case ones, which trades clean
    accuracy for radius. ``emma``: each rival class gets the radius at which it would win, between 0
    and eps, held constant, so that samples far inside their class do not cost accuracy.

    Parameters
    ----------
    eps : float
        Radius in the unit of the network's input. A little more than what is to be certified (1.1
        to 1.5 times) leaves room for new images.
    schedule : int or callable, optional
        An int n: eps grows linearly from 0 over the first n calls of :meth:`step`. A callable
        takes the number of the step and gives a factor. None: eps from the start.
    kind : {"cross_entropy", "trades", "emma"}
    weight : float
        Of the divergence in "trades".
    temperature : float
        Multiplies the logits in the loss; a certificate does not depend on it, training does.

    Notes
    -----
    The number of the step is a buffer. Where steps are captured as a CUDA graph, move the loss to
    the device and take an int or None as `schedule`: of another one the graph would keep the radius
    of the capture, and it is refused.

    Examples
    --------
    >>> bound = lrm.certify.LipschitzBound(model, (1, 28, 28))
    >>> loss = lrm.certify.CertifiedLoss(eps=0.33, schedule=steps // 2)
    >>> loss(bound, model(x), y).backward()
    >>> optimizer.step(), loss.step()

    References
    ----------
    K. Leino, Z. Wang, M. Fredrikson, *Globally-robust neural networks*, ICML 2021 (the first two);
    K. Hu, A. Zou, Z. Wang, K. Leino, M. Fredrikson, *Unlocking deterministic robustness
    certification on ImageNet*, NeurIPS 2023 (EMMA).
    """

    steps: Tensor

    def __init__(
        self,
        eps: float,
        schedule: int | Callable[[int], float] | None = None,
        kind: Kind = "cross_entropy",
        *,
        weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.eps = check_number("eps", eps, low=0)
        check_choice("kind", kind, ("cross_entropy", "trades", "emma"))
        if schedule is not None and not callable(schedule):
            hint = "a number of steps, a function or None"
            schedule = check_integer("schedule", schedule, low=1, hint=hint)
        self.schedule, self.kind = schedule, kind
        self.weight = check_number("weight", weight, low=0, open_low=True)
        self.temperature = check_number("temperature", temperature, low=0, open_low=True)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def step(self) -> None:
        """Advance the schedule by one; kept in the state dict."""
        self.steps.add_(1)

    @property
    def current_eps(self) -> float:
        """The radius that is trained for now."""
        if self.schedule is None:
            return self.eps
        done = int(self.steps)
        if callable(self.schedule):
            return self.eps * float(self.schedule(done))
        return self.eps * min(1.0, done / self.schedule)

    def _radius(self, device: torch.device) -> float | Tensor:
        """The radius of now; of a linear schedule on an accelerator a tensor that lives there."""
        if isinstance(self.schedule, int) and self.steps.device.type != "cpu":
            return self._radius_there(self.schedule)
        if (
            self.schedule is not None
            and device.type == "cuda"
            and torch.cuda.is_current_stream_capturing()
        ):
            raise RuntimeError(
                "a captured step would keep the radius of its capture: move the loss to the "
                "device, loss.to(device), and give schedule as a number of steps"
            )
        return self.current_eps

    def _radius_there(self, schedule: int) -> Tensor:
        return self.eps * (self.steps / schedule).clamp_max(1.0)  # no float64 on some accelerators

    def forward(self, bound: nn.Module | LipschitzBound, logits: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch, shape ().

        Parameters
        ----------
        bound : LipschitzBound or nn.Module
            Of the network that gave the logits.
        logits : Tensor, shape (B, classes)
        y : Tensor, shape (B,)
        """
        eps: Any = self._radius(logits.device)
        slack = _slack(bound, logits, y)
        if self.kind == "emma":
            with torch.no_grad():
                margins = logits.gather(1, y[:, None]) - logits
                tiny = torch.finfo(slack.dtype).tiny
                eps = (margins / slack.clamp_min(tiny)).clamp_min(0.0).clamp_max(eps)
        worst = self.temperature * (logits + eps * slack)
        if self.kind != "trades":
            return F.cross_entropy(worst, y)
        plain = self.temperature * logits
        gap = F.kl_div(
            F.log_softmax(worst, 1), F.log_softmax(plain, 1), reduction="batchmean", log_target=True
        )
        return F.cross_entropy(plain, y) + self.weight * gap

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, kind={self.kind!r}"
