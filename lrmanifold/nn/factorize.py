"""From a dense model to a low-rank one and back, in place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..manifolds.fixed_rank import Gradient
from .adapter import LowRankAdapter
from .layer import LowRankLayer
from .plan import LAYERS, Plan, make_plan

logger = logging.getLogger("lrmanifold")


def factorize(
    model: nn.Module,
    *,
    rank: int | float | Mapping[str, int | float] | None = None,
    compression: float | None = None,
    energy: float | None = None,
    tau: float | None = 0.1,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    init: str = "svd",
    gradient: Gradient = "factors",
    retraction: str | None = None,
    keep_larger: bool = False,
    rank_multiple: int = 1,
    summary: Callable[[Plan], Any] | None = None,
) -> nn.Module:
    """Replace linear and convolutional layers by low-rank ones, in place.

    The module tree and all names stay; a module used in several places is replaced once and stays
    shared. Layers stay dense when they would not get smaller, when their weight is tied to another
    module's or read directly (inside ``nn.MultiheadAttention``), and when they are subclasses.

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
    gradient, retraction
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
    ValueError
        Unless exactly one of rank, compression and energy is given and can be met, or if a pattern
        matches nothing. Nothing is changed then.
    """
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
                    module, d.rank, init=init, tau=tau, gradient=gradient, retraction=retraction
                )
            except ValueError as error:
                raise ValueError(f"layer {d.name!r} cannot be factorized: {error}") from error
    logger.info("factorize:\n%s", plan)
    if plan.decisions and not replacements:
        reasons = "; ".join(f"{d.name or '(model)'}: {d.reason}" for d in plan.decisions[:3])
        more = ", ..." if len(plan.decisions) > 3 else ""
        warnings.warn(f"factorize replaced no layer ({reasons}{more})", stacklevel=2)
    if summary is not None:
        summary(plan)
    return _replace(model, replacements)


def densify(model: nn.Module) -> nn.Module:
    """Replace every low-rank layer by the dense one with the same function, in place.

    An adapter is merged into its dense layer.

    The inverse of :func:`factorize` for deployment on code that knows torch's layers only.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    nn.Module
        `model`; if `model` is itself a low-rank layer, the dense layer.
    """
    adapters = [module for module in model.modules() if isinstance(module, LowRankAdapter)]
    replacements: dict[int, nn.Module] = {id(module): module.merge() for module in adapters}
    inner = {id(module.update) for module in adapters}
    for module in model.modules():
        if isinstance(module, LowRankLayer) and id(module) not in inner:
            replacements[id(module)] = module.to_dense()
    return _replace(model, replacements)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    for module in model.modules():
        if id(module) in replacements:
            # The same dictionaries, so that the handles which remove the hooks go on to work.
            for key in _HOOKS:
                replacements[id(module)].__dict__[key] = module.__dict__[key]
    if id(model) in replacements:
        return replacements[id(model)]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
        _avoid_fused_path(parent)
    return model


def _avoid_fused_path(module: nn.Module) -> None:
    """torch's fused encoder layer reads ``linear1.weight`` as a dense matrix: avoid it.

    Back when both layers are dense again.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        layers = (module.linear1, module.linear2)
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            module.__dict__.setdefault("_fused_activation", module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0
        elif "_fused_activation" in module.__dict__:
            module.activation_relu_or_gelu = module.__dict__.pop("_fused_activation")
