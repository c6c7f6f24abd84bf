"""PEFT: well-conditioned low-rank adapters as one of its methods.

Importing this module registers the method, under the name "LRMANIFOLD". After that, PEFT's own
functions work with it: ``get_peft_model``, several adapters, ``disable_adapter``,
``save_pretrained``, ``PeftModel.from_pretrained`` (import this module before loading, too),
``merge_and_unload`` and the rest::

    from lrmanifold.interop.peft import LowRankConfig
    from peft import get_peft_model

    model = get_peft_model(model, LowRankConfig(r=8, tau=0.1, target_modules=["q_proj", "v_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = lrmanifold.optim.CondLRAdam(trained, lr=1e-3)

Each chosen layer computes W x + b + ΔW x, with the ΔW of :func:`lrmanifold.nn.adapt`, which is 0
at the start. Adapters are float32 (float64 beside a float64 layer), also on layers of 16 or fewer
bits. Train them with an optimizer of this library: others, such as the AdamW that a Trainer takes
by default, leave the manifold, and the result is refused when it is saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    onload_layer,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from .._arguments import check_integer
from ..errors import GeometryError
from ..nn import bases
from ..nn.change import Change
from ..precision import storage_tolerance

__all__ = ["LowRankConfig", "LowRankTuner", "LowRankTunerLayer"]

NAME = "lrmanifold"
# PEFT saves one of several adapters without all whose name is a part of the key: so no adapter has
# the name of a part that is in the keys of others, these or those of the model.
_TAKEN = (
    "update", "start", "weight", "bias", "_extra_state", "model", "base_layer",
    "lrmanifold_changes", "modules_to_save", "original_module",
)  # fmt: skip


@dataclasses.dataclass
class LowRankConfig(peft.PeftConfig):
    """Configuration of well-conditioned low-rank adapters; PEFT saves and loads it.

    Parameters
    ----------
    r : int
        Rank of the adapters; cut to min(m, n) of each layer.
    tau : float or None
        The condition number of each U S Vᵀ stays at most 1 + tau; None for no bound.
    alpha : float, optional
        ΔW is scaled by alpha / r, as in LoRA, where r is cut as above; by 1 by default.
    dropout : float
        Of the adapters' input, in training.
    init : {"random", "svd"}
        Where U S Vᵀ starts, as in :class:`lrmanifold.nn.LowRankAdapter`.
    target_modules, exclude_modules : list of str or str
        As in PEFT's ``LoraConfig``: ends of names, a regular expression, or "all-linear". By
        default the layers that LoRA takes in models of transformers.
    layers_to_transform : int or list of int
        Indices of the blocks that get adapters; all by default.
    layers_pattern : str or list of str
        Name of the list of blocks, where PEFT does not find it.
    modules_to_save : list of str
        Other modules that are trained and saved, whole.
    """

    r: int = 8
    tau: float | None = 0.1
    alpha: float | None = None
    dropout: float = 0.0
    init: str = "random"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, NAME.upper())
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "layers_to_transform must be None where target_modules is a regular expression, "
                f"got {self.layers_to_transform!r}"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_to_transform must be given with layers_pattern, got None")


class LowRankTunerLayer(nn.Module, BaseTunerLayer):
    """A layer of the model and its adapters; PEFT puts it in place.

    Attributes
    ----------
    base_layer : nn.Module
        The layer that stood here.
    lrmanifold_changes : nn.ModuleDict
        From names of adapters to :class:`lrmanifold.nn.Change`.
    """

    base_layer: Any
    lrmanifold_changes: Any
    # Of BaseTunerLayer, which has no types.
    active_adapters: Any
    get_base_layer: Any
    set_adapter: Any
    adapter_layer_names = ("lrmanifold_changes",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lrmanifold_changes = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self.in_features, self.out_features = bases.sizes(base_layer)
        self.train(base_layer.training)

    def add(self, name: str, config: LowRankConfig) -> None:
        """Give the layer an adapter of this name."""
        base = self.get_base_layer()
        device, own = bases.place_of(base)
        rank = check_integer("r", config.r, low=1)
        change = Change(
            self.in_features,
            self.out_features,
            min(rank, self.in_features, self.out_features),
            weight=bases.matrix(base),
            tau=config.tau,
            alpha=config.alpha,
            dropout=config.dropout,
            init=config.init,
            device=device,
            dtype=torch.promote_types(own, torch.float32),
        )
        self.lrmanifold_changes[name] = change.train(self.training)
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base's output, plus ΔW x of each active adapter that is not merged."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.lrmanifold_changes:
                y = y + self.lrmanifold_changes[name](x).to(y.dtype)
        return y

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter in the layout of the base's weight."""
        change: Any = self.lrmanifold_changes[adapter]
        return bases.laid_out(self.get_base_layer(), change.delta())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base's weight; each sum is formed wide and rounded once.

        Parameters
        ----------
        safe_merge : bool
            Raise if the sum is not finite.
        adapter_names : list of str, optional
            The active ones by default.

        Raises
        ------
        ValueError
            If the base does not just multiply by a dense weight: it is quantized or low-rank, has
            hooks or a forward of its own. Nothing is changed then.
        """
        names = self._names(check_adapters_to_merge(self, adapter_names))
        if reason := self.why_not_merge(safe_merge, names):
            raise ValueError(f"adapters of this layer cannot be merged: {reason}")
        weight = bases.plain_weight(self.get_base_layer())
        for name in names:
            bases.add_to_weight(weight, self.get_delta_weight(name))  # type: ignore[arg-type]
            self.merged_adapters.append(name)

    def why_not_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> str:
        """Why :meth:`merge` would raise, in words; "" if it would not."""
        names = self._names(adapter_names)
        base = self.get_base_layer()
        weight = bases.plain_weight(base)
        if not names:
            return ""
        if weight is None:
            return _no_weight(base)
        if reason := bases.why_not_added(base):
            return reason
        total = weight.detach().clone()
        for name in names if safe_merge else ():
            bases.add_to_weight(total, self.get_delta_weight(name))
            if not bool(torch.isfinite(total).all()):
                return f"the weight with adapter {name!r} must be finite, is not"
        return ""

    def _names(self, adapter_names: list[str] | None) -> list[str]:
        """Those of the given adapters, by default the active ones, that are still to be merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [n for n in names if n in self.lrmanifold_changes and n not in self.merged_adapters]

    def unmerge(self) -> None:
        """Take merged adapters out of the base's weight again, to rounding."""
        if not self.merged:
            warnings.warn("no adapter is merged: nothing to unmerge", stacklevel=2)
        base = self.get_base_layer()
        weight = bases.plain_weight(base)
        if self.merged and weight is None:
            raise ValueError(f"adapters of this layer cannot be unmerged: {_no_weight(base)}")
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lrmanifold_changes:
                bases.add_to_weight(weight, self.get_delta_weight(name), -1.0)  # type: ignore[arg-type]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can turn the adapter into one of LoRA; it needs rank 2r to be exact."""
        return True

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own would also cast to the base's dtype.
        if adapter_name in self.lrmanifold_changes:
            place = bases.place_of(self.get_base_layer())[0] if device is None else device
            self.lrmanifold_changes[adapter_name].to(place)


class LowRankTuner(BaseTuner):
    """The model with its adapters, as PEFT keeps it in ``PeftModel.base_model``."""

    prefix = f"{NAME}_"
    tuner_layer_cls = LowRankTunerLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_new_adapter_config(self, config: LowRankConfig) -> None:
        super()._check_new_adapter_config(config)
        part = LowRankTunerLayer.adapter_layer_names[0]
        names = (key.partition(f".{part}")[0] for key, _ in self.model.named_modules())
        taken = {*_TAKEN, *(word for name in names for word in name.split("."))}
        for name, other in self.peft_config.items():
            if other is config and name in taken:
                raise ValueError(
                    "the adapter's name must be none of those of layers and parts of adapters, "
                    f"or PEFT saves others without their weights, got {name!r}"
                )

    def _create_and_replace(
        self,
        peft_config: LowRankConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"target_modules must not match {current_key!r}: its attention reads the weight "
                "and never calls the layer, so that an adapter would have no effect"
            )
        layer = target if isinstance(target, LowRankTunerLayer) else None
        if layer is None:
            if not bases.is_base(target):
                raise ValueError(
                    f"target_modules must match linear layers, but {current_key!r} is a "
                    f"{type(target).__name__}"
                )
            layer = LowRankTunerLayer(target)
            layer._active_adapter = self.active_adapters
        try:
            layer.add(adapter_name, peft_config)
        except ValueError as error:
            raise ValueError(f"layer {current_key!r} cannot be adapted: {error}") from error
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops the argument without a word where a method does not know it.
        if (names := kwargs.get("adapter_names")) is not None:
            raise ValueError(
                "adapter_names must be None: these adapters act on whole batches, got "
                f"{names!r}; choose one by set_adapter"
            )
        yield

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """As PEFT's, but a layer that cannot be merged is found before any is changed."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        why_tied = bases.tied(self.model)
        for name, layer in self.model.named_modules():
            if not isinstance(layer, LowRankTunerLayer):
                continue
            with onload_layer(layer):
                reason = layer.why_not_merge(safe_merge, adapter_names)
            if not reason and layer._names(adapter_names):
                reason = why_tied(layer.get_base_layer())
            if reason:
                raise ValueError(f"layer {name!r} cannot be merged: {reason}")

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict:
        _check_points(model)
        return super()._get_adapter_state_dict(model, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        part = LowRankTunerLayer.adapter_layer_names[0]
        return key.replace(f".{part}.{adapter_name}.", f".{part}.")


def _no_weight(base: nn.Module) -> str:
    return (
        "its base must have a dense weight of 16 bits or more, got a "
        f"{type(base).__name__} (quantized, computed or low-rank)"
    )


def _check_points(model: nn.Module) -> None:
    """Raise before saving what would not load: adapters that left their manifold."""
    module: Any
    for name, module in model.named_modules():
        if not isinstance(module, Change) or module.update.weight.is_meta:
            continue
        X = module.update.weight.detach()
        tol = storage_tolerance(X.dtype)
        ok, reason = module.update.manifold.check_point_on_manifold(
            X, explain=True, atol=tol, rtol=tol
        )
        if not ok:
            raise GeometryError(
                f"{name}.update.weight cannot be saved, {reason}: train adapters with an optimizer "
                "of lrmanifold.optim, others take them off the manifold"
            )


def _register() -> None:
    name = NAME.upper()
    if name in PeftType.__members__:
        return
    # PEFT refuses methods whose name its enumeration lacks, and has no function to extend it.
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    register_peft_method(name=NAME, config_cls=LowRankConfig, model_cls=LowRankTuner)


_register()
