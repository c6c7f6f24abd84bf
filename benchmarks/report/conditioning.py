"""The part of a page that asks which conditioning of a convolution counts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..robustness.conditioning import MEASURES
from .results import Results

HEAD = (
    *(f"cond, {name}" for name in MEASURES), "folded map, largest / middle", "folded map, largest",
    "network, local",
)  # fmt: skip


def section(results: Results, folder: Path) -> list[str]:
    """Parts in Markdown; none without ``conditioning.json`` of this plan."""
    path = folder / "conditioning.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["plan"] != results.plan.digest:
        return []
    column = results.column("worst")
    worst = {(g.family.name, s): v for g in results.main() for s, v in g.values(*column).items()}
    kept = [n for n in found["networks"] if (n["family"], n["seed"]) in worst]
    values = {(n["family"], n["seed"]): _of(n) for n in kept}
    rows = []
    for family in results.plan.families:
        own = [v for (name, _), v in values.items() if name == family.name]
        if own:
            rows.append([family.name, *(f"{np.mean(c):.3g}" for c in zip(*own, strict=True))])
    left = [worst[key] for key in values]
    correlations = [_rank_correlation(c, left) for c in zip(*values.values(), strict=True)]
    rows.append(["rank correlation with the worst case", *correlations])
    return [
        "### Which conditioning counts",
        "\n".join(
            [
                "| " + " | ".join(["family", *HEAD]) + " |",
                "|" + "---|" * (len(HEAD) + 1),
                *("| " + " | ".join(row) + " |" for row in rows),
            ]
        ),
        "Geometric means over the convolutions, also those that stay dense in every family; means "
        "over seeds. Kernel: as a matrix; folded: rows scaled by the batch norm, where one "
        "follows; map: of the convolution on a torus of the image's "
        "size, as many singular values a frequency as the kernel's rank; network: ‖J(x)‖ ‖x‖ / "
        f"‖f(x)‖, median of {found['images']} training images. Rank correlation: Spearman's, over "
        f"{len(values)} networks.",
    ]


def _of(network: dict[str, Any]) -> list[float]:
    layers = list(network["layers"].values())

    def over(measure: str, key: str) -> float:
        # a value of 0 makes an infinite ratio, which files hold as null
        found = [layer[measure][key] for layer in layers]
        return float(np.exp(np.mean([np.log(np.inf if v is None else v) for v in found])))

    return [
        *(over(measure, "cond") for measure in MEASURES),
        over("folded map", "middle"),
        over("folded map", "max"),
        network["network"],
    ]


def _rank_correlation(one: tuple[float, ...], other: list[float]) -> str:
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of equal values there is none: NaN
        found = float(stats.spearmanr(one, other).statistic)
    return "–" if np.isnan(found) else f"{found:+.2f}"
