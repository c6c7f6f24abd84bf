"""Layers whose weight nobody takes out: torch's pruning and normalisations are refused whole."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from ..errors import GeometryError

# Under these names torch's pruning and its older normalisations keep a weight or parts of it.
_PARTS = frozenset({"weight_orig", "weight_mask", "weight_g", "weight_v", "weight_u"})


class WholeWeight(nn.Module):
    """Refuses what would take ``weight`` out of the layer, before anything has changed.

    ``prune`` first registers ``weight_orig``; the older ``weight_norm`` first takes the weight out
    of ``_parameters`` and then registers ``weight_g``: there the weight is put back.
    """

    def _keep(self, weight: Any) -> None:
        """Remember `weight` as the one to put back."""
        self.__dict__["_own_weight"] = weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's; refused for parts of a weight."""
        self._refuse_parts(name)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As torch's; refused for parts of a weight."""
        self._refuse_parts(name)
        super().register_buffer(name, *args, **kwargs)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            self._refuse()
        super().__delattr__(name)

    def _refuse_parts(self, name: str) -> None:
        own = self.__dict__.get("_own_weight")
        taken = name != "weight" and own is not None and "weight" not in self._parameters
        if taken and not self.__dict__.get("_is_replica"):
            others = dict(self._parameters)
            self._parameters.clear()
            self._parameters.update({"weight": own, **others})
            self._refuse()
        if name in _PARTS:
            self._refuse()

    def _run_load_hooks(self, state_dict: dict[str, Any], *rest: Any) -> None:
        """What torch runs at the start of loading: hooks rename and convert, so they come first."""
        for hook in list(self._load_state_dict_pre_hooks.values()):
            hook(state_dict, *rest)

    def _load_without_hooks(self, *args: Any) -> None:
        hooks = self._load_state_dict_pre_hooks
        self._load_state_dict_pre_hooks = OrderedDict()
        try:
            nn.Module._load_from_state_dict(self, *args)
        finally:
            self._load_state_dict_pre_hooks = hooks

    def _refuse(self) -> None:
        raise GeometryError(
            f"weight cannot be removed from a {type(self).__name__}: parametrized, pruned or "
            "flattened factors leave the manifold; densify the layer first"
        )
