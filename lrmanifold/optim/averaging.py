"""Averages of weights along training (EMA, SWA) that stay on their manifolds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import geoopt
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .. import linalg
from .._arguments import (
    check_device,
    check_flag,
    check_instance,
    check_module,
    check_number,
    check_tensor,
)
from .._wrappers import parameters_without_wrappers, unwrapped
from ..errors import GeometryError
from ..factors import frobenius, pack, unpack
from ..manifolds import Factors, FixedRank
from ..parameter import manifold_of
from .arithmetic import PlainArithmetic
from .rank import resize

# In units of eps: the rounding of QR and SVD, with room.
_CANCELLED = 16


def average_points(manifold: FixedRank, X: Tensor, Y: Tensor, weight: float) -> Tensor:
    """The point nearest to (1 - weight) W_X + weight W_Y, the average of the dense matrices.

    That average has rank 2r. From the factors, by QR of [U_X U_Y] and [V_X V_Y] and the SVD of a
    2r x 2r core, cut to the rank of `manifold` and projected to its set: 16 (m+n) r² flops. Does
    not depend on the gauges of `X` and `Y`, which an average of the packed tensors does.

    Parameters
    ----------
    manifold : FixedRank
        Its rank, at most r_X + r_Y, is that of the result.
    X, Y : Tensor, shapes (..., m + r_X + n, r_X) and (..., m + r_Y + n, r_Y)
    weight : float
        In [0, 1]; 0 gives `X` and 1 gives `Y`, up to rounding and where `manifold` has their rank
        and projects its own points to themselves, which ``centre="mean"`` does not.

    Returns
    -------
    Tensor, shape (..., m + r + n, r), dtype of `Y`

    Raises
    ------
    ValueError
        If `weight` is out of range, or the two matrices cancel to rounding, unless a singular core
        is a point (``gradient="probe"``). Where only some singular values cancel, theirs are those
        of rounding, in directions of rounding, projected to the set.
    """
    check_instance("manifold", manifold, FixedRank, "an lrmanifold.FixedRank")
    check_tensor("X", X)
    check_tensor("Y", Y)
    weight = check_number("weight", weight, low=0.0, high=1.0)
    most = X.shape[-1] + Y.shape[-1]
    if manifold.rank > most:
        raise ValueError(
            f"rank of manifold must be at most r_X + r_Y = {most}, got {manifold.rank}"
        )
    with PlainArithmetic([Y.device.type]).plain():
        return _average_points(manifold, X, Y, weight)


def _average_points(manifold: FixedRank, X: Tensor, Y: Tensor, weight: float) -> Tensor:
    wide = linalg.compute_dtype(Y.dtype)
    A, B = (unpack(Z.to(wide), manifold.m, manifold.n) for Z in (X, Y))
    Q_u, R_u = linalg.qr(torch.cat((A.U, B.U), -1), rank_deficient=True)
    Q_v, R_v = linalg.qr(torch.cat((A.V, B.V), -1), rank_deficient=True)
    r = A.S.shape[-1]
    core = (1.0 - weight) * (R_u[..., :r] @ A.S @ R_v[..., :r].mT)
    core = core + weight * (R_u[..., r:] @ B.S @ R_v[..., r:].mT)
    P, s, Qh = linalg.svd(core)
    k = manifold.rank
    if not manifold.has_singular_points:
        size = (1.0 - weight) * frobenius(A.S) + weight * frobenius(B.S)
        if bool((s[..., 0] <= _CANCELLED * torch.finfo(wide).eps * size).any()):
            raise ValueError(
                f"(1 - weight) X + weight Y must not be 0, got matrices that cancel to "
                f"{float(s[..., 0].min()):.2e} for weight = {weight:g}: no point of "
                f"{manifold.name} is nearest to 0"
            )
    S = manifold.project_core(torch.diag_embed(s[..., :k]))
    return pack(Q_u @ P[..., :k], S, Q_v @ Qh[..., :k, :].mT).to(Y.dtype)


def _decayed(decay: float, average: Tensor, value: Tensor, count: Any) -> Tensor:
    """``torch.optim.swa_utils.get_ema_avg_fn(decay)``, which cannot be pickled."""
    return decay * average + (1 - decay) * value


class RetractingAverage(AveragedModel):
    """See :func:`retracting_average`."""

    def __init__(
        self, model: nn.Module, decay: float | None, device: Any, use_buffers: bool
    ) -> None:
        average: Any = None if decay is None else partial(_decayed, decay)
        super().__init__(unwrapped(model), device, average, use_buffers=use_buffers)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take up the present weights of `model`.

        Raises
        ------
        TypeError
            If `model` is no module.
        GeometryError
            If a weight has lost its manifold here or in `model`; nothing is changed then.
        ValueError
            If `model` has other parameters than the model that was copied, or in another order, or
            if one of its parameters or buffers has another shape; nothing is changed then. The rank
            of a weight may be another one, that of an adapter's start may not.
        """
        model = unwrapped(check_module("model", model))
        count = int(self.n_averaged)
        weight = 1.0 if count == 0 else 1.0 / (count + 1) if self.decay is None else 1 - self.decay
        pairs = self._on_manifolds(model)
        with PlainArithmetic({p.device.type for p, _ in pairs}).plain():
            new = [_average(p, q, weight) for p, q in pairs]
        for (p, q), X in zip(pairs, new, strict=True):
            if p.shape != q.shape:  # its rank was adapted: take the new one
                manifold: Any = p.manifold  # type: ignore[attr-defined]
                resize(p, Factors(*unpack(X, manifold.m, manifold.n)))
        super().update_parameters(model)
        for (p, _), X in zip(pairs, new, strict=True):
            p.copy_(X)

    def _on_manifolds(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        named, others = (parameters_without_wrappers(x) for x in (self.module, model))
        if list(named) != list(others):
            # torch goes by place, and stops where the shorter one ends
            odd = sorted(named.keys() ^ others.keys())
            raise ValueError(
                "model must have the parameters of the averaged one, got "
                + (f"one that differs in {odd}" if odd else f"them in the order {list(others)}")
            )
        pairs = []
        # Each parameter under one name: tied ones need one average.
        for p, name in {p: name for name, p in named.items()}.items():
            mine, other = manifold_of(p), manifold_of(others[name])
            if (mine is None) != (other is None):
                lost = "the average" if mine is None else "the model"
                raise GeometryError(f"{name!r} has lost its manifold in {lost}")
            if mine is not None:
                pairs.append((p, others[name]))
        _check_sizes(named, others)
        _check_sizes(*(dict(x.named_buffers(remove_duplicate=False)) for x in (self.module, model)))
        return pairs


def _check_sizes(mine: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Raise for another number or shape: torch stops midway there, or fills up by broadcasting."""
    if len(mine) != len(others):
        raise ValueError(
            f"model must have {len(mine)} buffers, as the averaged one, got {len(others)}"
        )
    for (name, p), q in zip(mine.items(), others.values(), strict=True):
        here, there = _size(p), _size(q)
        if here != there:
            raise ValueError(
                f"{name!r} of model must have the shape {here}, as in the averaged one, got "
                f"{there}: average the changed model anew"
            )


def _size(p: Tensor) -> tuple[int, ...]:
    """Shape; of a low-rank weight that of its matrix, as the rank may change."""
    M = manifold_of(p)
    return (*p.shape[:-2], M.m, M.n) if isinstance(M, FixedRank) else tuple(p.shape)


def _average(p: Tensor, q: Tensor, weight: float) -> Tensor:
    """The average on the manifold of `q`, on the device of `p`, in the wider of their dtypes."""
    manifold: geoopt.Manifold = q.manifold  # type: ignore[attr-defined]
    wide = torch.promote_types(p.dtype, q.dtype)
    X, Y = p.detach().to(wide), q.detach().to(p.device, wide)
    if weight == 1.0:
        # rounding of a shorter dtype is a drift in the longer one
        return Y.clone() if q.dtype == wide else manifold.projx(Y)
    if isinstance(manifold, FixedRank):
        return average_points(manifold, X, Y, weight)
    return manifold.projx(torch.lerp(X, Y, weight))


def retracting_average(
    model: nn.Module,
    decay: float | None = None,
    *,
    device: torch.device | str | None = None,
    use_buffers: bool = False,
) -> RetractingAverage:
    """A ``torch.optim.swa_utils.AveragedModel`` whose low-rank weights stay on their manifolds.

    torch's own averages U, S and V entry by entry. That leaves the manifold, and depends on the
    gauge: (-U, -S, V) is the same weight as (U, S, V), and the average of the two is zero. Here the
    *matrices* are averaged and the result is brought back to the nearest point of the manifold, so
    rank and bound on the condition number hold. Other parameters are averaged as torch does it.

    Parameters
    ----------
    model : nn.Module
        Copied; call ``update_parameters(model)`` after each step. Of a compiled or DDP model the
        one inside; ``update_parameters`` takes either.
    decay : float, optional
        In [0, 1): an exponential moving average, average ← decay · average + (1 - decay) · weight.
        None for the mean of all weights taken up (stochastic weight averaging). As each average is
        brought back before the next is added, the mean is the exact one up to what the projections
        drop.
    device : optional
        Of the copy.
    use_buffers : bool
        Average buffers too, as in torch; else they are copied.

    Returns
    -------
    AveragedModel
        Its ``module`` is the averaged model; ``state_dict`` and calls work as torch's.

    Raises
    ------
    ValueError
        If `decay` is out of range.

    Examples
    --------
    >>> average = lrmanifold.optim.retracting_average(model, decay=0.99)
    >>> optimizer.step(); average.update_parameters(model)
    """
    check_module("model", model)
    if decay is not None:
        decay = check_number("decay", decay, low=0.0, high=1.0, open_high=True)
    check_device("device", device)
    check_flag("use_buffers", use_buffers)
    return RetractingAverage(model, decay, device, use_buffers)
