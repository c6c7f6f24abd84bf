"""From a dense model to a low-rank one and back, in place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .. import retractions
from .._arguments import check_callable, check_choice, check_number
from ..manifolds.fixed_rank import GRADIENTS, Gradient
from ._obstacles import check_model
from ._replace import replace, replace_low_rank
from .plan import LAYERS, Plan, make_plan, unsupported

logger = logging.getLogger("lrmanifold")


def factorize(
    model: nn.Module,
    rank: int | float | Mapping[str, int | float] | None = None,
    *,
    compression: float | None = None,
    energy: float | None = None,
    tau: float | None = 0.1,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: str = "svd",
    gradient: Gradient = "factors",
    retraction: str | None = None,
    scale: float | str = "free",
    keep_larger: bool = False,
    rank_multiple: int = 1,
    summary: Callable[[Plan], Any] | None = None,
) -> nn.Module:
    """Replace linear and convolutional layers by low-rank ones, in place.

    Factorize first, then build the optimizer: one built before holds the old weights, and never
    moves the new ones.

    The module tree and all names stay; a module used in several places is replaced once and stays
    shared. Biases are taken themselves, so that they stay tied to what they are tied to; hooks,
    buffers and attributes that somebody added go on to the new layer.

    Layers stay dense when they would not get smaller, and wherever the new layer could not do all
    that the old one did: their weight is tied to another one or shares memory with it, is computed
    (pruned, normalised, parametrized), is read directly by another module or a hook (inside
    ``nn.MultiheadAttention``), is complex, quantized or sparse; they are subclasses, or compiled.
    With a share as rank, `compression` or `energy` the output layer stays dense, too, unless
    `include` (or a name without wildcards in `rank`) names it: it is the last linear layer, if it
    has fewer than 64 outputs or more than 4 times as many inputs as outputs. The plan says why for
    each. A warning is given if no layer was replaced at all, with what the
    model holds instead.

    Parameters
    ----------
    model : nn.Module
    rank : int, float or dict
        The rank (cut to min(m, n) of each layer); as a float, a share of min(m, n); as a dict, from
        glob patterns on qualified names to either, the first match counts and layers without one
        stay dense.
    compression : float
        Share of the *whole model's* parameters to remove, in (0, 1): the ranks are the largest
        common share of min(m, n) that removes at least that much.
    energy : float
        Share of ‖W‖² that the truncated SVD of each layer keeps, in (0, 1].
    tau : float or None
        Condition numbers stay at most 1 + tau; None for no bound.
    include, exclude : str or sequence of str
        Glob patterns on qualified module names; all layers by default.
    init : {"svd", "random"}
        From the dense weights, or fresh.
    gradient, retraction, scale
        Of the new layers, as in :class:`~lrmanifold.nn.LowRankLinear`.
    keep_larger : bool
        Factorize also layers that get no smaller by it.
    rank_multiple : int
        Round ranks to the nearest multiple that fits; layers smaller than it keep their rank. 16
        makes matrix products up to 1.5 times faster on the CPU.
    summary : callable, optional
        Called with the :class:`~lrmanifold.nn.Plan`, e.g. ``summary=print``. The plan also goes to
        the logger "lrmanifold" at level INFO.

    Returns
    -------
    nn.Module
        `model`; if `model` is itself a dense layer, the low-rank layer.

    Raises
    ------
    TypeError
        If an argument has a wrong type.
    ValueError
        Unless exactly one of rank, compression and energy is given and can be met; if a pattern
        matches nothing; if `model` is wrapped for many processes already, or scripted. Nothing is
        changed then.
    """
    check_model("model", model)
    if tau is not None:
        tau = check_number("tau", tau, low=0)
    check_choice("init", init, ("svd", "random"))
    check_choice("gradient", gradient, GRADIENTS)
    if retraction is not None:
        retractions.get(retraction)
    if summary is not None:
        check_callable("summary", summary, "a function of the plan")
    plan = make_plan(
        model,
        rank=rank,
        compression=compression,
        energy=energy,
        include=include,
        exclude=exclude,
        keep_larger=keep_larger,
        rank_multiple=rank_multiple,
    )
    dense = dict(model.named_modules())
    # All new layers exist before the first old one is replaced: an error changes nothing.
    replacements: dict[int, nn.Module] = {}
    for d in plan.decisions:
        if d.rank is not None:
            module = dense[d.name]
            try:
                replacements[id(module)] = LAYERS[type(module)].from_dense(
                    module,
                    d.rank,
                    init=init,
                    tau=tau,
                    gradient=gradient,
                    retraction=retraction,
                    scale=scale,
                )
            except ValueError as error:
                raise ValueError(f"layer {d.name!r} cannot be factorized: {error}") from error
    logger.info("factorize:\n%s", plan)
    if not replacements:
        warnings.warn(f"factorize replaced no layer ({_why(model, plan)})", stacklevel=2)
    if summary is not None:
        summary(plan)
    return replace(model, replacements)


def densify(model: nn.Module) -> nn.Module:
    """Replace every low-rank layer by the dense one with the same function, in place.

    An adapter is merged into its dense layer. The inverse of :func:`factorize` for deployment on
    code that knows torch's layers only.

    Biases are taken themselves, layers with a common weight get a common weight, and hooks, buffers
    and attributes that somebody added go on to the dense layer. A layer that cannot be replaced
    whole is left alone, and a warning names it.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    nn.Module
        `model`; if `model` is itself a low-rank layer, the dense layer.

    Raises
    ------
    TypeError
        If `model` is no module.
    ValueError
        If `model` is wrapped for many processes already, or scripted.
    """
    check_model("model", model)
    return replace_low_rank(model, _dense, _tie, "densify", needs_bias=False)


def _dense(layer: Any) -> nn.Module:
    return layer.to_dense()


def _why(model: nn.Module, plan: Plan) -> str:
    """Why no layer was replaced: the first reasons, and what the model holds instead."""
    reasons = [f"{d.name or '(model)'}: {d.reason}" for d in plan.decisions[:3]]
    if len(plan.decisions) > 3:
        reasons.append("...")
    others = unsupported(model)
    if others:
        reasons.append("not supported: " + ", ".join(others))
    return "; ".join(reasons) or "it holds no weights of 2 or more dimensions"


def _tie(new: Any, first: Any) -> None:
    new.weight = first.weight
