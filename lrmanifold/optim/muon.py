"""Muon on the manifold of well-conditioned low-rank matrices."""

from __future__ import annotations

from typing import Any

from .adam_step import adamw
from .items import Rule
from .muon_step import muon
from .optimizer import GeometricOptimizer


class CondLRMuon(GeometricOptimizer):
    r"""Robust low-rank Muon: steps of equal singular values, weights of bounded condition.

    A low-rank weight moves along the polar factors of the three blocks of its momentum in the
    tangent space. With :math:`\xi = UMV^\top + U_pV^\top + UV_p^\top` this is the steepest
    direction for the norm :math:`N(\xi) = \max(\|M\|_2, \|U_p\|_2, \|V_p\|_2)`, which the spectral
    norm exceeds by at most the golden ratio: :math:`N(\xi) \le \|\xi\|_2 \le 1.618\,N(\xi)`, both
    attained. No unit step in the spectral norm gains more than 1.618 times as much. Proofs, and
    the damping of singular values below a thousandth of the whole, are in
    ``lrmanifold/optim/muon_step.py``.

    The size of a step does not depend on that of the gradient: its singular values are at most
    :math:`\mathrm{lr}\sqrt{m/n}` in each block, so that a layer's output changes by about `lr`
    relative to its input, both by root mean square, at every width. On
    :class:`~lrmanifold.WellConditioned` the condition number is at most 1 + τ after every step.

    All other parameters take the step of ``torch.optim.AdamW``, those on other manifolds that of
    :class:`CondLRAdam`. Their rate is another one: put them into a group of their own, as below.

    Parameters
    ----------
    params : iterable
        Parameters, named parameters, or groups (see :func:`lrmanifold.optim.param_groups`).
    lr : float or Tensor
        0.02 was best for low-rank weights in ``benchmarks/muon_width.py``; others take about 1e-3.
    momentum : float
        In [0, 1); of low-rank weights.
    nesterov : bool
        Look ahead by one step of momentum; of low-rank weights.
    betas : (float, float)
        In [0, 1); of all other parameters.
    eps : float
        Of all other parameters.
    weight_decay : float
        Decoupled; on a low-rank weight it shrinks S by lr · weight_decay.
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

    Notes
    -----
    Costs about 50 (m + n + 4r) r² flops a weight beside CondLR's step, all in products: by count a
    fifteenth of dense Muon's at r = n/8, 1.7 times as many at r = n/2. On the CPU in float32 only
    about 4 (m + n + r) r² and three decompositions of size r. The gradient of a block that
    never had one (U_p of a square basis) is zero and stays so.

    ``OneCycleLR`` and ``CyclicLR`` cycle `betas` alone, as torch's own rule is: for the momentum of
    low-rank weights take :class:`~lrmanifold.optim.OptionScheduler`.

    References
    ----------
    K. Jordan et al., *Muon: an optimizer for hidden layers in neural networks*, 2024;
    J. Bernstein and L. Newhouse, *Old optimizer, new norm: an anthology*, 2024;
    G. Yang, J. Simons and J. Bernstein, *A spectral condition for feature learning*, 2023.

    Examples
    --------
    >>> model = lrmanifold.factorize(model, rank=0.25, tau=0.1)
    >>> groups = lrmanifold.optim.param_groups(model)
    >>> for group in groups:
    ...     group["lr"] = 0.02 if group["name"] == "manifold" else 1e-3
    >>> optimizer = lrmanifold.optim.CondLRMuon(groups)
    """

    rule = Rule(
        muon, adamw, ("momentum_buffer", "exp_avg"), ("exp_avg_sq",), low_rank=("momentum_buffer",)
    )
    _numbers = ("lr", "weight_decay", "penalty", "eps")
    _flags = ("maximize", "skip_nonfinite", "penalty_squared", "capturable", "nesterov")

    def __init__(
        self,
        params: Any,
        lr: Any = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        penalty: float = 0.0,
        penalty_squared: bool = False,
        clip_margin: float = 0.0,
        maximize: bool = False,
        skip_nonfinite: bool = True,
        capturable: bool = False,
        distribute: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "betas": betas, "eps": eps,
            "weight_decay": weight_decay, "penalty": penalty,
            "penalty_squared": penalty_squared, "clip_margin": clip_margin,
            "maximize": maximize, "skip_nonfinite": skip_nonfinite, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, distribute=distribute)
