"""A training run on disk: ``results.json``, ``model.pt`` and pictures in one folder.

Every file is written whole or not at all (to a temporary file, then renamed); ``results.json``
comes last, so a folder that has one is complete. ``model.pt`` holds plain tensors and words, read
with ``weights_only=True``: loading one from a stranger runs none of the stranger's code.
"""

from __future__ import annotations

import io
import json
import math
import os
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .._files import write_atomically
from ..errors import GeometryError
from ..nn import LowRankLayer, factorize
from . import models
from .data import Dataset
from .factors import TwoFactors, two_factors
from .methods import Method
from .training import Normalized

FORMAT = "lrmanifold run, version 1"


class RunError(ValueError):
    """A run's files are missing, damaged or not of this kind."""


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import geoopt
    import numpy

    import lrmanifold

    return {
        "lrmanifold": lrmanifold.__version__,
        "torch": torch.__version__,
        "geoopt": geoopt.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path, value: Any) -> None:
    """Strict JSON in UTF-8; JSON has no NaN and no infinity, they become null."""
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_figure(path: Path, figure: Any) -> None:
    """A PNG for a slide."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    write_atomically(path, buffer.getvalue())


def ranks_of(network: torch.nn.Module) -> dict[str, int]:
    """Rank of each low-rank layer or pair of factors, by name."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, LowRankLayer):
            found[name] = module.rank
        elif isinstance(module, TwoFactors):
            found[name] = len(module.svdvals())
    return found


def save_model(
    path: Path, model: Normalized, *, architecture: str, method: Method, data: Dataset
) -> None:
    """Write the weights and what :func:`load_model` needs to build the network around them."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    # geoopt's tensor subclass would need its code to be read again
    state = {name: value.as_subclass(torch.Tensor).clone() for name, value in state.items()}
    recipe = {
        "architecture": architecture,
        "kind": method.kind,
        "tau": method.tau,
        "ranks": ranks_of(model.network),
        "data": {
            "name": data.name,
            "image_shape": list(data.image_shape),
            "classes": data.classes,
            "mean": list(data.mean),
            "std": list(data.std),
        },
    }
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "recipe": recipe, "state": state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_model(path: str | os.PathLike[str]) -> Normalized:
    """The trained network of a run: its folder, or the ``model.pt`` in it.

    Raises
    ------
    RunError
        If there is none, or the file is damaged or something else.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.pt"
    if not path.is_file():
        raise RunError(f"{path}: no such file; `lrmanifold train` writes one")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle raise what they please
        # not torch's own words: they advise to read it without weights_only
        raise RunError(f"{path}: is damaged, or no file that `lrmanifold train` wrote") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise RunError(f"{path}: is not a model that `lrmanifold train` wrote")
    try:
        model = _rebuild(saved["recipe"])
        model.load_state_dict(saved["state"])
    except (KeyError, TypeError, ValueError, RuntimeError, GeometryError) as error:
        raise RunError(f"{path}: does not fit together ({str(error).splitlines()[0]})") from error
    return model.eval()


def load_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``results.json`` of a run, or :class:`RunError`."""
    path = Path(folder) / "results.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from error


def _rebuild(recipe: dict[str, Any]) -> Normalized:
    data: Any = SimpleNamespace(**recipe["data"])
    network: torch.nn.Module = models.build(recipe["architecture"], data)
    ranks = recipe["ranks"]
    if ranks and recipe["kind"] == "condlr":
        factorize(network, rank=ranks, tau=recipe["tau"], init="random", keep_larger=True)
    elif ranks:
        two_factors(network, ranks, keep_larger=True)
    return Normalized(network, data)
