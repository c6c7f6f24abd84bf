"""The dense layers of a model that may become low-rank, and what keeps some of them dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ._obstacles import Obstacles, has_whole_weights
from .attention import LowRankMultiheadAttention, projections
from .kinds import kind_of
from .layer import LowRankLayer
from .linear import LowRankLinear

# Part of the name of a layer that gives a model's outputs, by the habit of the large libraries.
_HEADS = frozenset({"fc", "head", "heads", "classifier", "lm_head", "score", "logits"})


@dataclass(frozen=True)
class Candidate:
    """One dense weight matrix that a low-rank layer may take the place of.

    Attributes
    ----------
    name : str
        Qualified name of the layer; of a projection of ``nn.MultiheadAttention`` that of the
        attention with ".q_proj", ".k_proj", ".v_proj" or ".out_proj".
    module : nn.Module
        The layer, or a stand-in for a projection.
    reason : str
        Why it stays dense, or "".
    key : tuple
        What weight it is: candidates with the same one share it.
    tied_to : str
        Name of the first candidate with this weight, if that is another one.
    attention : nn.MultiheadAttention or None
        What the projection belongs to.
    owner : str
        The name of that.
    also : tuple of str
        Names of layers that become low-rank together with this one.
    """

    name: str
    module: nn.Module
    reason: str
    key: tuple[Any, ...]
    tied_to: str = ""
    attention: nn.MultiheadAttention | None = None
    owner: str = ""
    also: tuple[str, ...] = ()

    def matches(self, patterns: Sequence[str] | None) -> bool:
        """Whether one of the patterns is for this layer; the attention's name counts, too."""
        names = {self.name, *self.also, *([self.owner] if self.attention is not None else [])}
        return any(fnmatchcase(n, p) for n in names for p in patterns or ())


def candidates(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    named: Sequence[str] = (),
) -> list[Candidate]:
    """All dense layers in the order of the model, shared ones once.

    Of a table of embeddings that linear layers share all become low-rank together, if one of the
    patterns `named` is for one of them; other layers that share a weight stay dense.

    Raises
    ------
    ValueError
        For a lazy layer that is neither excluded nor left out.
    """
    obstacles, found = Obstacles(model), []
    first: dict[Any, str] = {}
    for c in _all(model):
        lazy = False
        if include is not None and not c.matches(include):
            reason = "not included"
        elif c.matches(exclude):
            reason = "excluded"
        else:
            reason = _obstacle(c, obstacles)
            lazy = isinstance(c.module, nn.modules.lazy.LazyModuleMixin)
        if lazy:
            raise ValueError(
                f"layer {c.name!r} is lazy and has no shape yet: run a batch through the model "
                "first, or exclude it"
            )
        tied_to = first.setdefault(c.key, c.name)
        found.append(replace(c, reason=reason, tied_to="" if tied_to == c.name else tied_to))
    return _with_tied_heads(found, obstacles, named)


def why_tables_stay(model: nn.Module) -> dict[int, str]:
    """Why each table of embeddings stays dense even where it is named; "" where it would not."""
    if not any(isinstance(m, nn.Embedding) for m in model.modules()):
        return {}
    obstacles = Obstacles(model)
    found = [replace(c, reason=_obstacle(c, obstacles)) for c in _all(model)]
    found = _with_tied_heads(found, obstacles, ["*"])
    return {id(c.module): c.reason for c in found if isinstance(c.module, nn.Embedding)}


def layer_names(model: nn.Module) -> list[str]:
    """Names that patterns may be meant for: of all dense and low-rank layers."""
    names = [n for n, m in model.named_modules() if isinstance(m, LowRankLayer)]
    for c in _all(model):
        names += [c.name] if c.attention is None else [c.name, c.owner]
    return list(dict.fromkeys(names))


def _all(model: nn.Module) -> Iterator[Candidate]:
    parts: set[int] = set()
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention and has_whole_weights(module):
            parts.update(id(m) for m in module.modules())
            for part, layer in projections(module, copy=False).items():
                full = f"{name}.{part}" if name else part
                yield Candidate(full, layer, "", (id(module), part), "", module, name)
        elif id(module) not in parts and kind_of(module) and not isinstance(module, LowRankLayer):
            weight = getattr(module, "_parameters", {}).get("weight")
            yield Candidate(name, module, "", (id(module if weight is None else weight),))


def _obstacle(c: Candidate, obstacles: Obstacles) -> str:
    if c.attention is not None:
        return obstacles.of_attention(c.attention)
    kind = kind_of(c.module)
    assert kind is not None
    return obstacles.of_dense(c.module, kind)


def _with_tied_heads(
    found: list[Candidate], obstacles: Obstacles, named: Sequence[str]
) -> list[Candidate]:
    """A table of embeddings and the linear layers that share it may become low-rank together."""
    for c in [c for c in found if type(c.module) is nn.Embedding]:
        group = [d for d in found if d.key == c.key]
        holders = {p for d in group for p in obstacles.ties.get((id(d.module), "weight"), [])}
        if (
            len(group) == 1
            or len(holders) != len(group)
            or not any(d.matches(named) for d in group)
        ):
            continue
        if any(obstacles.of_dense(d.module, kind, tied=True) for d, kind in _kinds(group)):
            continue
        reasons = [d.reason for d in group]
        if "excluded" in reasons or all(r == "not included" for r in reasons):
            continue
        names = tuple(d.name for d in group)
        found = [replace(d, reason="", also=names) if d in group else d for d in found]
    return found


def _kinds(group: list[Candidate]) -> Iterator[tuple[Candidate, type[nn.Module]]]:
    for c in group:
        kind = kind_of(c.module)
        assert kind is not None
        yield c, kind


def output_layer(model: nn.Module) -> str | None:
    """Name of the layer whose outputs are the model's own; None if no layer looks like it.

    It is the last linear layer of the module tree, if one of these holds:

    - it has fewer than 64 outputs;
    - it has more than 4 times as many inputs as outputs (exactly 4 times is usual in the
      feed-forward parts of transformers);
    - it is called like one: "fc", "head", "heads", "classifier", "lm_head", "score" or "logits" is
      a part of its name, before any number (``fc`` of a ResNet, ``head.fc`` of timm,
      ``classifier.1`` of torchvision, but not ``blocks.11.mlp.fc``).
    """
    kinds = (nn.Linear, LowRankLinear)
    parts = {
        id(m)
        for a in model.modules()
        if isinstance(a, (nn.MultiheadAttention, LowRankMultiheadAttention))
        for m in a.modules()
    }
    layers = [m for _, m in model.named_modules(remove_duplicate=False) if isinstance(m, kinds)]
    layers = [m for m in layers if id(m) not in parts]
    if not layers or layers[-1] is model or not isinstance(layers[-1], nn.Linear):
        return None
    module = layers[-1]
    name = next(n for n, m in model.named_modules() if m is module)
    narrow = module.out_features < 64 or module.in_features > 4 * module.out_features
    return name if narrow or _is_called_a_head(name) else None


def _is_called_a_head(name: str) -> bool:
    for part in name.split("."):
        if part.isdigit():
            return False
        if part in _HEADS:
            return True
    return False
