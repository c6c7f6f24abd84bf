"""What a model's layers look like: ranks, singular values, conditioning, size."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._arguments import check_flag, check_module
from .._evaluation import evaluation_mode
from .._worst import worst
from ..nn import LowRankLayer, Other
from ..nn.candidates import candidates
from ..nn.inventory import others_of
from ..nn.kinds import is_quantized, kinds, weight_parameters
from ..nn.two_factors import is_pair
from . import _table
from ._cost import Passed, passed
from ._layer import LayerReport, measure


@dataclass(frozen=True)
class Report:
    """Layers in the order of the model's modules, and totals; prints as a table.

    Attributes
    ----------
    layers : tuple of LayerReport
    others : tuple of Other
        All other parameters, module by module, and why they are what they are: biases, norms,
        embeddings, recurrent layers, ... Together with the layers' trained weights they add up to
        all parameters.
    wide : bool
        Whether it prints with all columns.
    """

    layers: tuple[LayerReport, ...]
    others: tuple[Other, ...]
    wide: bool = False

    @property
    def other_parameters(self) -> int:
        """Everything that is no weight of a layer above."""
        return sum(other.weights for other in self.others)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the whole model if every layer were dense."""
        return self.other_parameters + sum(layer.dense_weights for layer in self.layers)

    @property
    def trained_parameters(self) -> int:
        """Parameters of the whole model as it is trained."""
        return self.other_parameters + sum(layer.trained_weights for layer in self.layers)

    @property
    def folded_parameters(self) -> int:
        """Parameters that inference needs: cores folded into a factor."""
        return self.other_parameters + sum(layer.folded_weights for layer in self.layers)

    @property
    def max_cond(self) -> float:
        """Largest cond of a layer; 1 without layers, nan if one is not known."""
        return worst((layer.cond for layer in self.layers), default=1.0)

    @property
    def cond_product(self) -> float:
        """Product of the layers' cond. **Not** a bound for the network's condition number.

        cond(f; x) <= Π cond(W_i) Π cond(σ_i) is false as soon as a layer has a kernel, and every
        layer of rank r < n has one: an input near the kernel is magnified without limit. True is
        cond(f; x) <= Π cond(W_i)/cosθ_i(x) · Π cond(σ_i; z_i) with cosθ_i(x) = ‖V_iᵀ z_i‖/‖z_i‖ at
        the layer's own input z_i, for networks without biases (mathematics 6). Measure
        cond(f; x) itself by :func:`lrmanifold.robustness.condition_number`.
        """
        return math.prod(layer.cond for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings and lists for JSON; what is not finite becomes None."""
        layers = [
            {**dataclasses.asdict(layer), "shape": list(layer.shape)} for layer in self.layers
        ]
        totals = {
            "other_parameters": self.other_parameters,
            "dense_parameters": self.dense_parameters,
            "trained_parameters": self.trained_parameters,
            "folded_parameters": self.folded_parameters,
            "max_cond": self.max_cond,
            "cond_product": self.cond_product,
            "cond_product_is_a_bound": False,
        }
        others = [dataclasses.asdict(other) for other in self.others]
        return {
            **_finite(totals),
            "layers": [_finite(layer) for layer in layers],
            "others": others,
        }

    def to_json(self, indent: int | None = 1) -> str:
        """:meth:`to_dict` as strict JSON: numbers that are not finite are null."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def table(self, *, wide: bool | None = None) -> str:
        """The report in words: six columns in 80 characters, or all of them.

        Parameters
        ----------
        wide : bool, optional
            As in :func:`report` by default.
        """
        wide = self.wide if wide is None else check_flag("wide", wide)
        return (_table.wide if wide else _table.narrow)(self)

    def __str__(self) -> str:
        return self.table()


def report(model: nn.Module, example: Any = None, *, wide: bool = False) -> Report:
    """Measure every linear and convolutional layer of a model, and list all else that has weights.

    Low-rank layers cost an r x r SVD, dense ones an m x n SVD in float64 (minutes for matrices of
    several thousand rows). Nothing of the model changes, no gradient is recorded. A layer used in
    several places is listed once. Two free factors of one matrix, as
    :func:`lrmanifold.experiments.factors.two_factors` makes them, are one layer: their product. A
    layer whose weight is complex, quantized, of 8 bits or sparse has a row that says so, without
    singular values. Other modules (dense embeddings and attention, recurrent layers, norms) are
    listed with their share of the parameters and the reason why they are dense; the shares of all
    rows add up to 100 %.

    Parameters
    ----------
    model : nn.Module
    example : Tensor, tuple or dict, optional
        A training batch (input, positional or keyword arguments): run once, to tell the cost of an
        optimizer step against forward and backward pass, and the size of the images that circular
        convolutions see.
    wide : bool
        Print all columns (singular values, tau, drift, counts) instead of six in 80 characters.

    Returns
    -------
    Report

    Raises
    ------
    TypeError
        If `model` is no module.
    ValueError
        If a layer has no values yet: on the meta device, or lazy.
    """
    check_module("model", model)
    check_flag("wide", wide)
    seen_by: dict[str, Passed] = {} if example is None else passed(model, example)
    layers: list[LayerReport] = []
    seen: dict[int, str] = {}
    parts: set[int] = set()
    # a dense table of embeddings is listed with the others: its SVD would take minutes
    known: tuple[type[nn.Module], ...] = (
        LowRankLayer,
        *(kind for kind in kinds() if kind is not nn.Embedding),
    )
    # evaluation mode: a spectral norm in train mode would change each time its weight is read
    with torch.no_grad(), evaluation_mode(model):
        for name, module in model.named_modules():
            pair = is_pair(module)
            if id(module) in parts or not (
                pair or isinstance(module, known) or is_quantized(module)
            ):
                continue
            rows, image = seen_by.get(name, (None, None))
            held = [module]
            if pair:
                held = list(module.children())
                parts.update(map(id, held))
                _, image = seen_by.get(f"{name}.0".lstrip("."), (None, None))
            layer = measure(name, module, image)
            parameters = [p for part in held for p in weight_parameters(part)]
            if first := next((seen[id(p)] for p in parameters if id(p) in seen), None):
                layer = dataclasses.replace(
                    layer,
                    note=f"weight of {first}",
                    dense_weights=0,
                    trained_weights=0,
                    folded_weights=0,
                )
            seen.update({id(p): name for p in parameters if id(p) not in seen})
            layers.append(dataclasses.replace(layer, batch=rows))
        others = others_of(model, seen)
    reasons = {c.name: c.reason for c in candidates(model)}
    layers = [
        layer if layer.note else dataclasses.replace(layer, note=reasons.get(layer.name, ""))
        for layer in layers
    ]
    return Report(tuple(layers), others, wide)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity."""
    bad = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {k: None if k in bad else v for k, v in values.items()}
