"""Which layers of a model are low-rank, as a dictionary for a file, and a model built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .. import retractions
from .._arguments import check_instance, check_integer, check_module, shown
from .._wrappers import names_without_wrappers
from ._replace import replace
from .attention import LowRankMultiheadAttention, projections
from .candidates import Candidate, candidates
from .change import Change
from .kinds import kinds
from .layer import LowRankLayer
from .linear import LowRankLinear

_VERSION = 1
_KEYS = ("rank", "tau", "gradient", "retraction", "scale")


def structure(model: nn.Module) -> dict[str, Any]:
    """What :func:`restructure` needs to make the same low-rank layers of the dense model.

    Parameters
    ----------
    model : nn.Module
        Names are those without ``torch.compile`` and DDP around it.

    Returns
    -------
    dict
        For JSON: {"version": 1, "layers": {name: {"rank", "tau", "gradient", "retraction",
        "scale"}}}. Without values of weights: those are in the state dict.

    Raises
    ------
    ValueError
        If `model` holds an adapter: its frozen weight belongs to it, see
        :func:`trained_state_dict`. If it holds a subclass of a low-rank layer. For a retraction
        without a name: a function that :func:`lrmanifold.retractions.register` does not know.

    Examples
    --------
    >>> torch.save((lrm.nn.structure(model), model.state_dict()), "model.pt")
    >>> layers, state = torch.load("model.pt")
    >>> again = lrm.nn.restructure(Net(), layers)
    >>> again.load_state_dict(state)
    """
    check_module("model", model)
    layers: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for name, module in names_without_wrappers(model).items():
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, Change):
            raise ValueError(
                f"model must hold no adapter, got one at {name!r}: save it by "
                "lrmanifold.nn.trained_state_dict"
            )
        if isinstance(module, LowRankLayer):
            kind = type(module)
            if not kind.__module__.startswith(f"{__package__}."):
                raise ValueError(
                    f"model must hold no subclass of a low-rank layer, got a {kind.__name__} at "
                    f"{name!r}: restructure would make the class that it is derived from"
                )
            M: Any = module.manifold
            layers[name] = {
                "rank": module.rank,
                "tau": module.tau,
                "gradient": M.gradient,
                "retraction": _name_of(name, M.retraction),
                "scale": getattr(M, "scale", "free"),
            }
    return {"version": _VERSION, "layers": layers}


def _name_of(layer: str, retraction: Any) -> str:
    for name in retractions.available():
        if retraction in (name, retractions.get(name)):
            return name
    raise ValueError(
        f"the retraction of layer {layer!r} must have a name to be written, got "
        f"{shown(retraction)}: give it one by lrmanifold.retractions.register"
    )


def restructure(model: nn.Module, found: Mapping[str, Any]) -> nn.Module:
    """Give a dense model the low-rank layers that another one had, in place, with random weights.

    Parameters
    ----------
    model : nn.Module
        Dense, with the names and shapes of the model that :func:`structure` was called on. Layers
        that share a weight share it afterwards.
    found : dict
        What :func:`structure` gave.

    Returns
    -------
    nn.Module
        `model`; if `model` is itself a layer, the low-rank one.

    Raises
    ------
    ValueError
        If a layer is not there, or is of no kind that can become low-rank, or `found` lacks a part
        of its geometry. Nothing is changed then.
    """
    check_module("model", model)
    layers = _layers(found)
    there: dict[str, Candidate] = {c.name: c for c in candidates(model, exclude=["*"])}
    if missing := [name for name in layers if name not in there]:
        raise ValueError(
            f"model must have the dense layers of the structure, but {missing[0]!r} is not there "
            f"or of another kind; there are {list(there)}"
        )
    classes = kinds()
    made: dict[Any, Any] = {}
    replacements: dict[int, nn.Module] = {}
    attentions: dict[str, dict[str, dict[str, Any]]] = {}
    for name, how in layers.items():
        c = there[name]
        if c.attention is not None:
            attentions.setdefault(c.owner, {})[name.rpartition(".")[2]] = how
            continue
        kind = classes.get(type(c.module))
        if kind is None:
            raise ValueError(f"layer {name!r} is a {type(c.module).__name__}, a subclass")
        new = _made(name, kind, c.module, how["rank"], how)
        if c.key in made:
            new.weight = made[c.key].weight
        made.setdefault(c.key, new)
        replacements[id(c.module)] = new
    for owner, parts in attentions.items():
        attention: Any = model.get_submodule(owner)
        made_of: dict[str, nn.Module] = dict(projections(attention))
        for key, how in parts.items():  # each may have a geometry of its own
            name = f"{owner}.{key}" if owner else key
            made_of[key] = _made(name, LowRankLinear, made_of[key], how["rank"], how)
        replacements[id(attention)] = LowRankMultiheadAttention._of(attention, made_of)
    return replace(model, replacements)


def _layers(found: Any) -> dict[str, dict[str, Any]]:
    check_instance("found", found, Mapping, "a dict of structure()")
    if found.get("version") != _VERSION or not isinstance(found.get("layers"), Mapping):
        raise ValueError(
            f"found must be what structure() gave, version {_VERSION}, got version "
            f"{found.get('version')!r}"
        )
    layers = {}
    for name, how in found["layers"].items():
        place = f"found['layers'][{name!r}]"
        check_instance(place, how, Mapping, f"a dict with {', '.join(_KEYS)}")
        if set(how) != set(_KEYS):
            raise ValueError(
                f"{place} must have {', '.join(_KEYS)}, got {', '.join(map(str, how))}"
            )
        check_integer(f"{place}['rank']", how["rank"], low=1)
        layers[str(name)] = dict(how)
    return layers


def _made(name: str, kind: Any, module: nn.Module, rank: Any, how: Mapping[str, Any]) -> Any:
    geometry = {key: value for key, value in how.items() if key != "rank"}
    try:
        return kind.from_dense(module, rank, init="random", **geometry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"layer {name!r} cannot be made: {error}") from error
