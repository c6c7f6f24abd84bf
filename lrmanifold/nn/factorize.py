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
from .attention import LowRankMultiheadAttention, projections
from .inventory import unsupported
from .kinds import kinds
from .linear import LowRankLinear
from .plan import Decision, Plan, make_plan

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
    """Replace dense layers by low-rank ones, in place.

    Layers of these kinds: ``nn.Linear``, ``nn.Conv1d/2d/3d``, ``nn.ConvTranspose1d/2d/3d``,
    transformers' ``Conv1D``, the projections of ``nn.MultiheadAttention`` (each with its own rank,
    by the names ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``) and, where they are named,
    tables of embeddings.

    Factorize first, then build the optimizer: one built before holds the old weights, and never
    moves the new ones. A warning says so at its second step.

    The module tree and all names stay; a module used in several places is replaced once and stays
    shared. Biases are taken themselves, so that they stay tied to what they are tied to; hooks,
    buffers and attributes that somebody added go on to the new layer, those of the weight
    (``weight.no_weight_decay``) to the new weight.

    Layers stay dense when they would not get smaller, and wherever the new layer could not do all
    that the old one did: their weight is tied to another one or shares memory with it, is computed
    (pruned, normalised, parametrized), has hooks of its own, is in a list that a module keeps, is
    read by a hook or, as ``self.layer.weight``, by another module, is complex, quantized or sparse;
    they are subclasses, or compiled. With a share as rank,
    `compression` or `energy` the output layer stays dense, too, unless `include` (or a name without
    wildcards in `rank`) names it. It is the last linear layer of the module tree, if it has fewer
    than 64 outputs, more than 4 times as many inputs as outputs, or a name by which models call
    their heads: "fc", "head", "heads", "classifier", "lm_head", "score" or "logits" is a part of
    it, before any number. A table of embeddings stays dense, whatever the rank, unless a pattern of
    `include` or `rank` other than "*" matches it or the head that shares its weight; then both
    become low-rank and stay tied.

    The plan lists every module with parameters, with its share of them and the reason why it
    stays. A warning is given if no layer was replaced at all, with what the model holds instead.

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
        Glob patterns on qualified module names; all layers by default. The name of an attention
        stands for its projections.
    init : {"svd", "random"}
        From the dense weights, or fresh.
    gradient, retraction, scale
        Of the new layers, as in :class:`~lrmanifold.nn.LowRankLinear`.
    keep_larger : bool
        Factorize also layers that get no smaller by it.
    rank_multiple : int
        Round ranks to the nearest multiple that fits; layers smaller than it keep their rank. With
        16 matrix products can be faster on the CPU.
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
        matches nothing; if a weight has no low-rank neighbour, as zero and NaN have none (`exclude`
        leaves it dense); if a layer is lazy and has no shape yet, unless it is left out; if `model`
        is wrapped for many processes already, or scripted. Nothing is changed then.
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
    geometry = {"tau": tau, "gradient": gradient, "retraction": retraction, "scale": scale}
    replacements = _replacements(model, plan, init=init, **geometry)
    logger.info("factorize:\n%s", plan)
    if not replacements:
        warnings.warn(f"factorize replaced no layer ({_why(model, plan)})", stacklevel=2)
    low = [d for d in plan.decisions if d.rank is not None]
    if low and all(d.note for d in low):
        warnings.warn(
            f"every low-rank layer gets rank 1: rank = {rank} is a share of min(m, n), and "
            f"{low[0].note}; an int is the rank itself",
            stacklevel=2,
        )
    if summary is not None:
        summary(plan)
    return replace(model, replacements)


def _replacements(model: nn.Module, plan: Plan, **how: Any) -> dict[int, nn.Module]:
    """The new layers, by the id of the old one.

    All of them exist before the first old one is replaced: an error changes nothing.
    """
    modules, classes = dict(model.named_modules()), kinds()
    found: dict[int, nn.Module] = {}
    parts: dict[str, list[Decision]] = {}
    made: dict[str, Any] = {}
    for d in plan.decisions:
        if d.rank is None:
            continue
        module = modules.get(d.name)
        owner = d.name.rpartition(".")[0]
        if module is None or isinstance(modules.get(owner), nn.MultiheadAttention):
            parts.setdefault(owner, []).append(d)
            continue
        new = _made(classes[type(module)], d, module, how)
        if d.tied_to in made:
            new.weight = made[d.tied_to].weight
        made[d.name] = found[id(module)] = new
    for owner, decisions in parts.items():
        attention: Any = modules[owner]
        layers: dict[str, nn.Module] = dict(projections(attention))
        for d in decisions:
            part = d.name.rpartition(".")[2]
            layers[part] = _made(LowRankLinear, d, layers[part], how)
        found[id(attention)] = LowRankMultiheadAttention._of(attention, layers)
    return found


def _made(kind: Any, d: Decision, module: nn.Module, how: Mapping[str, Any]) -> Any:
    try:
        return kind.from_dense(module, d.rank, **how)
    except ValueError as error:
        hint = f"; exclude={d.name!r} leaves it dense" if d.name else ""
        raise ValueError(f"layer {d.name!r} cannot be factorized: {error}{hint}") from error


def densify(model: nn.Module) -> nn.Module:
    """Replace every low-rank layer by the dense one with the same function, in place.

    An adapter is merged into its dense layer. The inverse of :func:`factorize` for deployment on
    code that knows torch's layers only. What :func:`~lrmanifold.nn.adapt` has frozen stays frozen,
    the layers with adapters too: ``model.requires_grad_(True)`` to train on. That of a single
    :class:`~lrmanifold.nn.LowRankAdapter` is trainable again.

    Biases are taken themselves, layers with a common weight get a common weight, and hooks, buffers
    and attributes that somebody added go on to the dense layer. A layer that cannot be replaced
    whole is left alone, and a warning names it: its weight has hooks, say, or a module reads its
    factors, as :class:`~lrmanifold.nn.ConvexPotential` does, which has no dense form.

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
    return replace_low_rank(model, _dense, _tie, "densify", needs_bias=False, dense=True)


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
