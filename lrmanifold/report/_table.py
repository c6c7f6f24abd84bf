"""A report in words: the table of 80 columns, the wide one, and what is said below them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from ..nn.inventory import merged
from ._cost import RANK_MULTIPLE, better_rank
from ._layer import LayerReport

WIDTH = 80
_NAME = 30
_REASONS = frozenset({"bias", "vectors"})


def narrow(report: Any) -> str:
    """Six columns in 80 characters, then notes line by line."""
    total = max(1, report.trained_parameters)
    rows: list[tuple[str, ...]] = [("layer", "kind", "shape", "rank", "cond", "share")]
    notes: dict[str, list[str]] = {}
    for layer in report.layers:
        name = layer.name or "(model)"
        share = f"{layer.trained_weights / total:.1%}"
        rows.append((name, layer.kind, _shape(layer), _rank(layer), f"{layer.cond:.4g}", share))
        if words := _last_cell(layer):
            notes.setdefault(words, []).append(name)
    for other in merged(report.others):
        name, short = other.name or "(model)", other.reason in _REASONS
        what = other.reason if short else ""
        rows.append((name, other.kind, what, "", "", f"{other.weights / total:.1%}"))
        if not short:
            notes.setdefault(other.reason, []).append(name)
    rows.append(("total", "", "", "", "", "100.0%"))
    kinds = [r[1].removeprefix("LowRank").removeprefix("NonDynamicallyQuantizable") for r in rows]
    rows = [(_shortened(r[0]), kind, *r[2:]) for r, kind in zip(rows, kinds, strict=True)]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    spare = WIDTH - sum(widths[2:]) - 10
    widths[1] = min(widths[1], max(8, spare - widths[0]))
    rows = [(r[0], _cut(r[1], widths[1]), *r[2:]) for r in rows]
    lines = _lines(rows, widths, left={0, 1, 2})
    for words, names in notes.items():
        several = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines += _wrapped(f"{several}: {words}")
    lines += _wrapped(
        f"parameters: {report.dense_parameters:,} if all were dense, {report.trained_parameters:,} "
        f"trained ({_share(report.trained_parameters, report)}), {report.folded_parameters:,} for "
        f"inference ({_share(report.folded_parameters, report)})"
    )
    if report.layers:
        lines.append(
            f"product of cond: {report.cond_product:.4g}, NOT a bound: "
            "docs/mathematics.md, section 6"
        )
    else:
        lines.append("no linear or convolutional layer")
    return "\n".join([*lines, *(line for words in _cost_words(report) for line in _wrapped(words))])


def wide(report: Any) -> str:
    """All columns, and what the product of the conds says and what it does not."""
    head = ("layer", "kind", "shape", "rank", "sigma_max", "sigma_min", "cond", "tau", "drift")
    last = "rank/batch" if any(layer.batch for layer in report.layers) else ""
    rows: list[tuple[str, ...]] = [(*head, "dense", "trained", "folded", "share", last)]
    dense, trained = report.dense_parameters, report.trained_parameters
    folded, total = report.folded_parameters, max(1, trained)
    rows += [_row(layer, total) for layer in report.layers]
    for other in merged(report.others):
        counts, share = [f"{other.weights:,}"] * 3, f"{other.weights / total:.1%}"
        rows.append((other.name or "(model)", other.kind, *[""] * 7, *counts, share, other.reason))
    totals = f"{dense:,}", f"{trained:,}", f"{folded:,}", "100.0%"
    rows.append(("total", *[""] * 8, *totals, ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = _lines(rows, widths, left={0, 1, 13})
    lines.append(
        f"parameters kept: {_share(trained, report)} trained, (m+r+n) r a layer; "
        f"{_share(folded, report)} for inference, (m+n) r with the core folded in"
    )
    words = [_product_words(report), *_cost_words(report)]
    return "\n".join([*lines, *(line for text in words for line in textwrap.wrap(text, 100))])


def _lines(rows: Sequence[tuple[str, ...]], widths: Sequence[int], left: set[int]) -> list[str]:
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _wrapped(words: str) -> list[str]:
    return textwrap.wrap(words, WIDTH, subsequent_indent="  ")


def _share(part: int, report: Any) -> str:
    return f"{part / report.dense_parameters:.1%}" if report.dense_parameters else "100.0%"


def _shortened(name: str) -> str:
    """The end of a long name tells more than its beginning."""
    return name if len(name) <= _NAME else "…" + name[1 - _NAME :]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _shape(layer: LayerReport) -> str:
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    return f"{layer.groups} x ({shape})" if layer.groups > 1 else shape


def _rank(layer: LayerReport) -> str:
    """Of a dense layer the word, and its numerical rank where that is not full."""
    if layer.low_rank:
        return str(layer.rank)
    full = layer.rank in (0, min(layer.shape))
    return "dense" if full else f"dense {layer.rank}"


def _row(layer: LayerReport, total: int) -> tuple[str, ...]:
    return (
        layer.name or "(model)",
        layer.kind,
        _shape(layer),
        str(layer.rank),
        f"{layer.sigma_max:.4g}",
        f"{layer.sigma_min:.4g}",
        f"{layer.cond:.4g}",
        "-" if layer.tau is None else f"{layer.tau:g}",
        "-" if layer.drift is None else f"{layer.drift:.1e}",
        f"{layer.dense_weights:,}",
        f"{layer.trained_weights:,}",
        f"{layer.folded_weights:,}",
        f"{layer.trained_weights / total:.1%}",
        _last_cell(layer),
    )


def _last_cell(layer: LayerReport) -> str:
    share = f"{layer.rank / layer.batch:.3f}" if layer.batch and layer.low_rank else ""
    of_map = "" if layer.map_cond is None else f"map cond {layer.map_cond:.4g}"
    return ", ".join(filter(None, (share, of_map, layer.note)))


def _cost_words(report: Any) -> list[str]:
    """Hints about speed, where there is something to say."""
    words = []
    ranks = [
        f"{layer.name or '(model)'} {layer.rank} -> {better}"
        for layer in report.layers
        if layer.low_rank and (better := better_rank(layer.rank, min(layer.shape)))
    ]
    if ranks:
        words.append(f"faster at ranks that are multiples of {RANK_MULTIPLE}: {', '.join(ranks)}")
    if any(layer.batch for layer in report.layers):
        words.append(
            "rank/batch: about the cost of an optimizer step against forward and backward "
            "(batch: rows of all output positions); 4/3 of it with the exact metric"
        )
    return words


def _product_words(report: Any) -> str:
    if not report.layers:
        return "no linear or convolutional layer"
    kernels = sum(layer.has_kernel for layer in report.layers)
    words = (
        f"product of the layers' cond: {report.cond_product:.4g}. This is NOT a bound for the "
        f"network's condition number: {kernels} of {len(report.layers)} layers have a kernel "
        "(rank < n), and a bound at an input x needs each cond(W_i) divided by cosθ_i(x) = "
        "|V_iᵀz_i|/|z_i| at the layer's own input z_i, times the condition number of each "
        "activation there (and no biases)."
    )
    if any("Conv" in layer.kind for layer in report.layers):
        words += (
            " A convolution's cond is that of its kernel as a matrix, not of the map on images: "
            "that is the map cond, known where patches do not overlap and, with an example, for "
            "circular padding."
        )
    return words
