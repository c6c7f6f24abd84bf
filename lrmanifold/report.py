"""What a model's layers look like: ranks, singular values, conditioning, size."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._arguments import check_module
from ._cost import RANK_MULTIPLE, Passed, better_rank, passed
from ._evaluation import evaluation_mode
from ._layer_report import LayerReport, is_quantized, measure, weight_parameters
from .nn import LowRankLayer
from .nn.plan import LAYERS


@dataclass(frozen=True)
class Report:
    """Layers in the order of the model's modules, and totals; prints as a table.

    Attributes
    ----------
    layers : tuple of LayerReport
    other_parameters : int
        Everything that is no weight of a layer above: biases, norms, embeddings, ...
    """

    layers: tuple[LayerReport, ...]
    other_parameters: int

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
        conds = [layer.cond for layer in self.layers]
        return math.nan if any(map(math.isnan, conds)) else max(conds, default=1.0)

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
        return {**_finite(totals), "layers": [_finite(layer) for layer in layers]}

    def __str__(self) -> str:
        head = ("layer", "kind", "shape", "rank", "sigma_max", "sigma_min", "cond", "tau", "drift")
        last = "rank/batch" if any(layer.batch for layer in self.layers) else ""
        rows: list[tuple[str, ...]] = [(*head, "dense", "trained", "folded", last)]
        rows += [_row(layer) for layer in self.layers]
        dense, trained, folded = (
            self.dense_parameters,
            self.trained_parameters,
            self.folded_parameters,
        )
        rows += [("other", *[""] * 8, *[f"{self.other_parameters:,}"] * 3, "biases, norms, ...")]
        rows += [("total", *[""] * 8, f"{dense:,}", f"{trained:,}", f"{folded:,}", "")]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        left = {0, 1, 12}  # words; the rest are numbers
        lines = [
            "  ".join(
                cell.ljust(w) if i in left else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        share = trained / dense if dense else 1.0, folded / dense if dense else 1.0
        lines.append(
            f"parameters kept: {share[0]:.1%} trained, (m+r+n) r a layer; {share[1]:.1%} for "
            "inference, (m+n) r with the core folded in"
        )
        words = [self._product_words(), *self._cost_words()]
        return "\n".join([*lines, *(line for text in words for line in textwrap.wrap(text, 100))])

    def _cost_words(self) -> list[str]:
        """Hints about speed, where there is something to say."""
        words = []
        ranks = [
            f"{layer.name or '(model)'} {layer.rank} -> {better}"
            for layer in self.layers
            if layer.low_rank and (better := better_rank(layer.rank, min(layer.shape)))
        ]
        if ranks:
            words.append(
                f"faster at ranks that are multiples of {RANK_MULTIPLE}: {', '.join(ranks)}"
            )
        if any(layer.batch for layer in self.layers):
            words.append(
                "rank/batch: about the cost of an optimizer step against forward and backward "
                "(batch: rows of all output positions); 4/3 of it with the exact metric"
            )
        return words

    def _product_words(self) -> str:
        if not self.layers:
            return "no linear or convolutional layer"
        kernels = sum(layer.has_kernel for layer in self.layers)
        words = (
            f"product of the layers' cond: {self.cond_product:.4g}. This is NOT a bound for the "
            f"network's condition number: {kernels} of {len(self.layers)} layers have a kernel "
            "(rank < n), and a bound at an input x needs each cond(W_i) divided by cosθ_i(x) = "
            "|V_iᵀz_i|/|z_i| at the layer's own input z_i, times the condition number of each "
            "activation there (and no biases)."
        )
        if any("Conv" in layer.kind for layer in self.layers):
            words += (
                " A convolution's cond is that of its kernel as a matrix, not of the map on "
                "images: that is the map cond, known where patches do not overlap and, with an "
                "example, for circular padding."
            )
        return words


def report(model: nn.Module, example: Any = None) -> Report:
    """Measure every linear and convolutional layer of a model.

    Low-rank layers cost an r x r SVD, dense ones an m x n SVD in float64 (minutes for matrices of
    several thousand rows). Nothing of the model changes, no gradient is recorded. A layer used in
    several places is listed once. Other modules (embeddings, norms, transposed convolutions) are
    counted under `other_parameters` only. A layer whose weight is complex, quantized, of 8 bits or
    sparse has a row that says so, without singular values.

    Parameters
    ----------
    model : nn.Module
    example : Tensor, tuple or dict, optional
        A training batch (input, positional or keyword arguments): run once, to tell the cost of an
        optimizer step against forward and backward pass, and the size of the images that circular
        convolutions see.

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
    seen_by: dict[str, Passed] = {} if example is None else passed(model, example)
    layers: list[LayerReport] = []
    seen: dict[int, str] = {}
    kinds: tuple[type[nn.Module], ...] = (LowRankLayer, *LAYERS)
    # evaluation mode: a spectral norm in train mode would change each time its weight is read
    with torch.no_grad(), evaluation_mode(model):
        for name, module in model.named_modules():
            if not isinstance(module, kinds) and not is_quantized(module):
                continue
            rows, image = seen_by.get(name, (None, None))
            layer = measure(name, module, image)
            parameters = weight_parameters(module)
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
        other = sum(p.numel() for p in model.parameters() if id(p) not in seen)
    return Report(tuple(layers), other)


def _row(layer: LayerReport) -> tuple[str, ...]:
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    if layer.groups > 1:
        shape = f"{layer.groups} x ({shape})"
    tau = "-" if layer.tau is None else f"{layer.tau:g}"
    return (
        layer.name or "(model)",
        layer.kind,
        shape,
        str(layer.rank),
        f"{layer.sigma_max:.4g}",
        f"{layer.sigma_min:.4g}",
        f"{layer.cond:.4g}",
        tau,
        "-" if layer.drift is None else f"{layer.drift:.1e}",
        f"{layer.dense_weights:,}",
        f"{layer.trained_weights:,}",
        f"{layer.folded_weights:,}",
        _last_cell(layer),
    )


def _last_cell(layer: LayerReport) -> str:
    share = f"{layer.rank / layer.batch:.3f}" if layer.batch and layer.low_rank else ""
    of_map = "" if layer.map_cond is None else f"map cond {layer.map_cond:.4g}"
    return ", ".join(filter(None, (share, of_map, layer.note)))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no NaN and no infinity."""
    bad = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {k: None if k in bad else v for k, v in values.items()}
