"""All that is measured on a trained network; each measure is kept as soon as it is done."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrmanifold.experiments.data import Dataset
from lrmanifold.experiments.runs import write_json
from lrmanifold.experiments.training import Normalized

from . import attacks, bound, measures
from .experiment import Attacks, digest
from .table import finite
from .training import OutOfTimeError

Measure = Callable[[], Any]


def plan(
    model: Normalized,
    data: Dataset,
    asked: Attacks,
    *,
    once: bool,
    source: nn.Module | None,
    device: torch.device | str,
) -> dict[str, Measure]:
    """Names and functions of the measures that are asked for.

    `once` adds those that are done for one seed only; `source` is the network whose adversarial
    images are tried on this one.
    """
    x, y = data.test_x.to(device), data.test_y.to(device)
    everything, few = (x, y), (x[: asked.images], y[: asked.images])
    pgd: dict[str, Any] = {"steps": asked.steps, "restarts": asked.restarts}
    found: dict[str, Measure] = {"clean": lambda: measures.clean(model, data)}
    if asked.fgsm:
        found["fgsm"] = lambda: attacks.fast_gradient(model, everything, asked.fgsm)
    if asked.fgsm_unclipped:
        found["fgsm_unclipped"] = lambda: attacks.fast_gradient(
            model, everything, asked.fgsm_unclipped, clip=None
        )
    if asked.fgsm_l2:
        found["fgsm_l2"] = lambda: attacks.fast_gradient(model, few, asked.fgsm_l2, norm="l2")
    if asked.pgd:
        found["pgd"] = lambda: attacks.projected_gradient(model, few, asked.pgd, **pgd)
    if asked.pgd_l2:
        found["pgd_l2"] = lambda: attacks.projected_gradient(
            model, few, asked.pgd_l2, norm="l2", **pgd
        )
    if asked.transfer and source is not None:
        found["transfer"] = lambda: attacks.transferred(
            model, source, few, asked.transfer, asked.steps
        )
    if not once:
        return found
    if asked.condition_images:
        found["condition"] = lambda: bound.compare(model, data.test_x[: asked.condition_images])
    if asked.masking:
        some = (x[: asked.masking_images], y[: asked.masking_images])
        found["masking"] = lambda: attacks.masking(model, some, asked.masking)
    if asked.foolbox_images:
        start = (x[: asked.foolbox_images], y[: asked.foolbox_images])
        found["foolbox"] = lambda: attacks.independent(model, start, asked.boundary_steps)
    return found


def evaluate(
    planned: dict[str, Measure],
    folder: Path,
    asked: Attacks,
    *,
    deadline: float,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Results by name; what ``folder`` already holds is not measured again."""
    path = folder / f"measures-{digest(dataclasses.asdict(asked))}.json"
    results: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    for name, measure in planned.items():
        if name in results:
            continue
        if time.monotonic() > deadline:
            raise OutOfTimeError
        begin = time.perf_counter()
        results[name] = finite(measure())
        results.setdefault("seconds", {})[name] = round(time.perf_counter() - begin, 2)
        log(f"measured {name} in {results['seconds'][name]:.1f} s")
        write_json(path, results)
    return results
