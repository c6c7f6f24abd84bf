"""A frozen layer with named low-rank changes, of which one is active."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .._replaced import note_frozen
from . import bases
from ._carry import take_marks
from ._computed import ComputedWeight
from .change import Change
from .layer import LowRankLayer


class AdaptedLayer(ComputedWeight):
    """A frozen layer and its named adapters; :func:`lrmanifold.nn.adapt` puts it in place.

    The output is ``base_layer(x)``, plus that of the active change on the same input. The base is
    called as it is, whatever it stores: it may be quantized, or low-rank itself.

    Attributes
    ----------
    base_layer : nn.Module
        The layer that stood here, itself.
    changes : nn.ModuleDict
        From names to changes ΔW = alpha/rank (U S Vᵀ - U₀ S₀ V₀ᵀ), whose ``update`` is a
        :class:`LowRankLinear`.
    active : str or None
        Name of the change that counts; None for the base alone.
    merged : str or None
        Name of the change that the base's weight holds at present.
    """

    # Names that a layer in its place does not take over.
    inner_parts = frozenset({"base_layer", "changes", "kept"})
    set_instead = "that of base_layer, or tie the layer before lrmanifold.nn.adapt"
    kept: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.changes = nn.ModuleDict()
        self.active: str | None = None
        self.merged: str | None = None
        # The base's weight from before merging: moved along, never saved.
        self.register_buffer("kept", None, persistent=False)
        self.train(base_layer.training)

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return bases.sizes(self.base_layer)[0]

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return bases.sizes(self.base_layer)[1]

    @property
    def bias(self) -> Any:
        """The base's bias, or None."""
        return getattr(self.base_layer, "bias", None)

    @property
    def weight(self) -> Any:
        """The base's weight, plus the active change where it is a dense one, with gradients."""
        base: Any = self.base_layer
        weight, change = bases.plain_weight(base), self._change()
        if weight is None or change is None:
            return base.weight
        D = bases.laid_out(base, change.dense_change(weight.dtype))
        return (weight.to(D.dtype) + D).to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output, plus ΔW x of the active change unless the base holds it."""
        y = self.base_layer(x, *args, **kwargs)
        change = self._change()
        return y if change is None else y + change(x).to(y.dtype)

    def _change(self) -> Change | None:
        if self.active is None or self.merged is not None:
            return None
        return self.changes[self.active]  # type: ignore[return-value]

    def activate(self, name: str | None) -> None:
        """Make one change count and train, if this layer has it; None for none.

        Raises
        ------
        ValueError
            If a change is merged.
        """
        if self.merged is not None:
            raise ValueError(f"adapter {self.merged!r} is merged: unmerge the model first")
        self.active = name if name is not None and name in self.changes else None
        for key, change in self.changes.items():
            change.requires_grad_(key == self.active)
            if key != self.active:  # an optimizer of it alone moves nothing now
                note_frozen(change, self.changes)

    def why_not_merge(self) -> str:
        """Why the base's weight cannot take up a change, in words; "" if it can."""
        if isinstance(self.base_layer, LowRankLayer):
            return "its base is low-rank and would not stay so: densify the model instead"
        return bases.why_not_added(self.base_layer)

    def fold(self, keep: bool) -> None:
        """Add the active change to the base's weight; with `keep`, remember the weight."""
        change, weight = self._change(), bases.plain_weight(self.base_layer)
        if change is None or weight is None:
            return
        self.kept = weight.detach().clone() if keep else None
        bases.add_to_weight(weight, bases.laid_out(self.base_layer, change.delta()))
        self.merged = self.active

    @torch.no_grad()
    def unfold(self) -> None:
        """Take the merged change out of the base's weight again."""
        weight = bases.plain_weight(self.base_layer)
        if self.merged is None or weight is None:
            return
        change: Any = self.changes[self.merged]
        if self.kept is not None:
            weight.copy_(self.kept)
        else:
            bases.add_to_weight(weight, bases.laid_out(self.base_layer, change.delta()), -1.0)
        self.kept, self.merged = None, None

    def to_dense(self) -> nn.Module:
        """The base's dense layer with the same function, as frozen as the base; this layer stays.

        The bias is the base's own, not a copy.
        """
        base: Any = self.base_layer
        if isinstance(base, LowRankLayer):
            dense: Any = base.to_dense()
        else:
            dense = copy.deepcopy(base)
            take_marks(dense.weight, base.weight)
        change = self._change()
        if change is not None:
            bases.add_to_weight(dense.weight, bases.laid_out(base, change.delta()))
        if base.bias is not None:
            dense.bias = base.bias
        return dense.train(self.training)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.refuse_merged("saved")
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.refuse_merged("loaded")
        super()._load_from_state_dict(*args)

    def refuse_merged(self, what: str) -> None:
        """Raise RuntimeError if a change is merged."""
        # The file would hold the sum under the base's name, and the change a second time.
        if self.merged is not None:
            raise RuntimeError(
                f"a layer whose adapter {self.merged!r} is merged cannot be {what}: call "
                "lrmanifold.nn.unmerge(model) first, or lrmanifold.densify(model) for dense layers"
            )

    def extra_repr(self) -> str:
        merged = "" if self.merged is None else f", merged={self.merged!r}"
        return f"active={self.active!r}{merged}"
