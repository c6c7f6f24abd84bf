"""CondLR: stochastic gradient descent on the manifold of well-conditioned low-rank matrices."""

from __future__ import annotations

from typing import Any

from .._arguments import check_choice, check_flag
from .items import Rule
from .optimizer import GeometricOptimizer
from .step import Metric, condlr, sgd


class CondLR(GeometricOptimizer):
    r"""Robust low-rank SGD: drop-in for ``torch.optim.SGD`` on models with low-rank layers.

    Parameters that live on a geoopt manifold (the packed weights of :mod:`lrmanifold.nn`, or any
    ``geoopt.ManifoldParameter``) take a Riemannian step, see :func:`condlr_update`: the autograd
    gradient is projected to the tangent space with the exact factor metric :math:`(SS^\top)^{-1}`,
    momentum is transported, and the retraction of the parameter's manifold brings the point home.
    On :class:`~lrmanifold.WellConditioned` the condition number is at most 1 + τ after every step.
    All other parameters take the step of ``torch.optim.SGD`` with the same momentum.

    One backward pass a step. ``.grad`` is only read. No m x n matrix is formed.

    Parameters
    ----------
    params : iterable
        Parameters, named parameters, or groups (see :func:`lrmanifold.optim.param_groups`).
    lr : float or Tensor
        Learning rate.
    momentum : float
        In [0, 1).
    nesterov : bool
        Needs ``momentum > 0``.
    weight_decay : float
        L2 decay; on a low-rank weight it acts on S alone, as the gradient of ½ wd ‖W‖² does.
    penalty : float
        Weight β of RobustDLRT's regulariser R(S). Its gradient acts on S beside the momentum, not
        through it. An option of the group like `lr`: schedule it by writing
        ``optimizer.param_groups[i]["penalty"]`` or with
        :class:`~lrmanifold.optim.OptionScheduler`.
    penalty_squared : bool
        β R(S)² instead: smooth where the core is perfectly conditioned.
    metric : {"exact", "scalar"}
        "scalar" replaces :math:`(SS^\top)^{-1}` by its mean size, the number :math:`r/\|S\|^2`. It
        is the gradient for another Riemannian metric on the same manifold,
        :math:`\|S\|^2/r\,(\|\dot U\|^2 + \|\dot V\|^2) + \|\dot S\|^2` for (U̇ S Vᵀ + U Ṡ Vᵀ +
        U S V̇ᵀ) with UᵀU̇ = 0 and VᵀV̇ = 0, which does not depend on the gauge: a descent direction, 0
        at the same points, and the same where S is a multiple of an orthogonal matrix. On cores of
        condition number 1 + τ the two differ by factors in [(1 + τ)⁻², (1 + τ)²]. It saves two of
        eight products of the step; on cores far from orthogonal it converges more slowly.
    clip_margin : float
        In [0, 1). A core that leaves the band of ratio 1 + τ is brought back to it by the exact
        projection if 0, and further, to the ratio 1 + (1 - margin) τ, otherwise. Then fewer steps
        change the core.
    maximize : bool
        Ascend instead. Decay and penalty still pull inwards.
    skip_nonfinite : bool
        Leave a parameter and its momentum bit for bit as they are when its gradient holds NaN or
        Inf, and count it in ``state[p]["skipped"]``. If False, the CPU raises FloatingPointError.
    capturable : bool
        For CUDA graphs: the rate is kept in a tensor on the device, which schedulers write into. A
        captured step keeps everything else as it was: other options of the group, and the rate too
        without this. Not on the CPU. How to capture a training step, and what else it may not do:
        :class:`lrmanifold.experiments.replay.Replay`, and :doc:`/in-practice`.
    distribute : bool
        For replicas with equal gradients (DistributedDataParallel): each rank of the default
        process group computes the steps of its share of the low-rank weights, and sends weights and
        momentum to the others, so that every rank has all of both. Pays where a step costs more
        than sending it. Sharded parameters (``fully_shard``) need no option: see the notes.

    Raises
    ------
    ValueError
        For options out of range.
    GeometryError
        In :meth:`step`, if a parameter lost its manifold or is off it by more than rounding.

    Notes
    -----
    With FSDP2 build the optimizer after ``fully_shard``. A step gathers one weight after the other,
    every process moves it, and each keeps its rows; momentum is sharded like the weight.

    torch's flags `foreach`, `fused`, `differentiable` and `dampening` do not exist here.

    References
    ----------
    D. Savostianova et al., *Robust low-rank training via approximate orthonormal constraints*,
    NeurIPS 2023; for the metric mathematics 1.

    Examples
    --------
    >>> model = lrmanifold.factorize(model, rank=0.2, tau=0.1)
    >>> optimizer = lrmanifold.optim.CondLR(model.parameters(), lr=0.1, momentum=0.9)
    """

    rule = Rule(condlr, sgd, vectors=("momentum_buffer",), switch="momentum")

    def __init__(
        self,
        params: Any,
        lr: Any,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        penalty: float = 0.0,
        penalty_squared: bool = False,
        metric: Metric = "exact",
        clip_margin: float = 0.0,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        capturable: bool = False,
        distribute: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "penalty": penalty, "penalty_squared": penalty_squared, "metric": metric,
            "clip_margin": clip_margin, "maximize": maximize, "skip_nonfinite": skip_nonfinite,
            "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, distribute=distribute)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        check_choice("metric", group["metric"], ("exact", "scalar"))
        group["nesterov"] = check_flag("nesterov", group["nesterov"])
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov=True needs momentum > 0, got momentum = 0")
