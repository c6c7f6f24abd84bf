"""A norm that leaves a bound on the layer before it whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from .._arguments import check_flag, check_integer, check_number
from ._obstacles import check_model, has_hooks
from .exchange import exchanged

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class MeanOnlyBatchNorm(nn.Module):
    r"""Take the mean of each channel over the batch away, and add a bias; multiply by nothing.

    Batch norm multiplies channel c by :math:`\gamma_c/\sqrt{v_c + \varepsilon}`. Folded into the
    layer before it, that is another matrix :math:`DW`, and a bound on W bounds it only up to
    cond(D). This norm only shifts, so what holds for W holds for both together: the condition
    number, and with τ = 0 the norm. As a map it is 1-Lipschitz in evaluation mode. It takes the
    place of ``nn.BatchNorm1d``, ``2d`` and ``3d``, but bears smaller rates than they do, as nothing
    brings the size of a signal back. What it is worth on images: docs/which-tau-and-rank.md.

    Parameters
    ----------
    num_features : int
        Channels C of an input (N, C, ...).
    momentum : float
        Share of the new mean in the running one, in (0, 1].
    bias : bool
        Add a learned bias a channel.

    Attributes
    ----------
    bias : Parameter of shape (C,), or None
    running_mean : Tensor of shape (C,)
        What evaluation mode takes away. Under data parallelism each process takes the mean of its
        own share of the batch, as ``nn.BatchNorm2d`` does.

    References
    ----------
    T. Salimans, D. P. Kingma, *Weight normalization*, NeurIPS 2016, section 4.
    """

    bias: Tensor | None
    running_mean: Tensor

    def __init__(
        self,
        num_features: int,
        momentum: float = 0.1,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = check_integer("num_features", num_features, low=1)
        self.momentum = check_number("momentum", momentum, low=0.0, high=1.0)
        if self.momentum == 0.0:
            raise ValueError("momentum must be in (0, 1], got 0: the running mean would never move")
        wanted = check_flag("bias", bias)
        zeros = torch.zeros(self.num_features, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(zeros.clone()) if wanted else None)
        self.register_buffer("running_mean", zeros)

    def reset_parameters(self) -> None:
        """Bias and running mean to zero."""
        self.running_mean.zero_()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`.

        Raises
        ------
        ValueError
            If `x` is not (N, C, ...), or training sees at most one value a channel.
        """
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"x must have shape (N, {self.num_features}, ...), got {tuple(x.shape)}"
            )
        if self.training:
            if x.numel() <= self.num_features:
                raise ValueError(
                    "training needs more than one value a channel, got an x of shape "
                    f"{tuple(x.shape)}: its mean would be itself"
                )
            others = [d for d in range(x.ndim) if d != 1]
            mean = x.mean(others, dtype=linalg.compute_dtype(x.dtype))
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        else:
            mean = self.running_mean
        shift = -mean if self.bias is None else self.bias - mean
        return x + shift.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 2))

    def extra_repr(self) -> str:
        return f"{self.num_features}, momentum={self.momentum}, bias={self.bias is not None}"

    @classmethod
    def convert(cls, model: nn.Module) -> nn.Module:
        """Put one in the place of every batch norm of an untrained `model`, in place.

        The biases themselves are kept. Call it on a new model::

            model = lrmanifold.nn.MeanOnlyBatchNorm.convert(model)
            lrmanifold.factorize(model, rank=0.25, tau=0.1)

        Parameters
        ----------
        model : nn.Module
            With ``nn.BatchNorm1d``, ``2d`` or ``3d`` anywhere, or one of these itself.

        Returns
        -------
        nn.Module
            `model`, or the norm that takes its place.

        Raises
        ------
        TypeError
            If `model` is no module, or has a kind of batch norm whose forward is not torch's.
        ValueError
            If the model is wrapped for many processes already, or a norm cannot be replaced without
            changing what it was set or trained to do: scales or running statistics that are not
            those of a new one, ``track_running_stats=False``, ``momentum=None``, hooks. Nothing is
            changed then.
        """
        check_model("model", model)
        new: dict[int, nn.Module] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                new[id(module)] = cls._in_place_of(name or "the model", module)
        return exchanged(model, new)

    @classmethod
    def _in_place_of(cls, name: str, old: Any) -> MeanOnlyBatchNorm:
        if type(old) not in _BATCH_NORMS:
            raise TypeError(
                f"model: {name} is a {type(old).__name__}, which may do more than torch's batch "
                "norm: replace it by hand"
            )
        if lost := _lost(old):
            raise ValueError(
                f"model: {name} ({type(old).__name__}) has {lost}, which a norm without scale "
                "would lose: convert a new, untrained model"
            )
        like = {"device": old.running_mean.device, "dtype": old.running_mean.dtype}
        norm = cls(old.num_features, old.momentum, bias=False, **like)
        norm._parameters["bias"] = old._parameters["bias"]
        return norm.train(old.training)


def _lost(old: Any) -> str:
    """What the conversion of a batch norm would lose; or ""."""
    if old.running_mean is None:
        return "track_running_stats=False"
    if old.momentum is None or not 0.0 < old.momentum <= 1.0:
        return f"momentum={old.momentum}"
    if has_hooks(old):
        return "hooks"
    if not _all(old.running_var, 1.0) or not _all(old.running_mean, 0.0):
        return "running statistics of a training"
    if old.weight is not None and not _all(old.weight, 1.0):
        return "scales other than 1"
    return ""


def _all(t: Tensor, value: float) -> bool:
    return t.is_meta or bool((t.detach() == value).all())
