"""Riemannian Adam on the manifold of well-conditioned low-rank matrices."""

from __future__ import annotations

from typing import Any

from .adam_step import adam, adamw
from .items import Rule
from .optimizer import GeometricOptimizer


class CondLRAdam(GeometricOptimizer):
    r"""Robust low-rank Adam: drop-in for ``torch.optim.AdamW`` on models with low-rank layers.

    Parameters on a manifold take the step of :func:`adam_update`; all others that of
    ``torch.optim.AdamW``. On :class:`~lrmanifold.WellConditioned` the condition number is at most
    1 + τ after every step.

    Because the step is scaled to entries of size 1, `lr` has about the meaning that it has
    for a dense weight; rates a little above AdamW's are usual (the step has (m + r + n) r entries
    of size `lr` instead of m n).

    Parameters
    ----------
    params : iterable
        Parameters, named parameters, or groups (see :func:`lrmanifold.optim.param_groups`).
    lr : float or Tensor
    betas : (float, float)
        In [0, 1).
    eps : float
    weight_decay : float
        Decoupled; on a low-rank weight it shrinks S.
    penalty : float
        Weight β of RobustDLRT's regulariser R(S), decoupled too.
    penalty_squared : bool
        β R(S)² instead.
    clip_margin, maximize, skip_nonfinite, capturable, distribute
        As in :class:`CondLR`.

    Raises
    ------
    ValueError
        For options out of range.
    GeometryError
        In :meth:`step`, if a parameter lost its manifold or is off it by more than rounding.

    References
    ----------
    G. Becigneul and O.-E. Ganea, *Riemannian adaptive optimization methods*, 2019;
    I. Loshchilov and F. Hutter, *Decoupled weight decay regularization*, 2019.
    """

    rule = Rule(adam, adamw, vectors=("exp_avg",), moments=("exp_avg_sq",))
    _numbers = ("lr", "weight_decay", "penalty", "eps")

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        penalty: float = 0.0,
        *,
        penalty_squared: bool = False,
        clip_margin: float = 0.0,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        capturable: bool = False,
        distribute: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "penalty": penalty, "penalty_squared": penalty_squared, "clip_margin": clip_margin,
            "maximize": maximize, "skip_nonfinite": skip_nonfinite, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, distribute=distribute)
