"""A training run on disk: ``results.json``, ``model.pt`` and pictures in one folder.

Every file is written whole or not at all; ``results.json`` comes last, so a folder that has one is
complete. Both files have a seal, so that damage is found when they are read. ``model.pt`` holds
plain tensors and words, read with ``weights_only=True``: loading one from a stranger runs none of
the stranger's code.
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

from .._arguments import check_path
from .._files import write_atomically
from .._sealed import BLANK, SealError, check_seal, read_torch, set_seal, write_torch
from ..errors import GeometryError
from ..nn import LowRankLayer, factorize
from . import models
from .data import Dataset
from .factors import TwoFactors, two_factors
from .methods import PROBED, Method
from .orthogonal import orthogonalize
from .training import Normalized

FORMAT = "lrmanifold run, version 2"
DEMO_FORMAT = "lrmanifold demo, version 2"
# From before there were seals.
_UNSEALED = ("lrmanifold run, version 1", "lrmanifold demo, version 1")


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
    write_atomically(path, _json(value))


def write_results(path: Path, value: dict[str, Any]) -> None:
    """A ``results.json`` that :func:`load_results` reads: JSON with a seal in it.

    Parameters
    ----------
    path : path
    value : dict
        With the key "format": :data:`FORMAT` or :data:`DEMO_FORMAT`.
    """
    write_atomically(path, set_seal(_json({**value, "seal": BLANK})))


def _json(value: Any) -> bytes:
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


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
    write_torch(path, {"format": FORMAT, "recipe": recipe, "state": state})


def load_model(path: str | os.PathLike[str]) -> Normalized:
    """The trained network of a run: its folder, or the ``model.pt`` in it.

    Raises
    ------
    RunError
        If there is none, or the file is damaged or something else.
    """
    path = Path(check_path("path", path))
    if path.is_dir():
        path = path / "model.pt"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise RunError(f"{path}: {what}; `lrmanifold train` writes one")
    try:
        saved, sealed = read_torch(path)
    except SealError as error:
        raise RunError(f"{path}: {error}; `lrmanifold train` writes one") from error
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from error
    found = saved.get("format") if isinstance(saved, dict) else None
    if found not in (FORMAT, *_UNSEALED):
        raise RunError(f"{path}: is not a model that `lrmanifold train` wrote")
    if not sealed and found not in _UNSEALED:
        raise RunError(f"{path}: is damaged: its seal is missing")
    try:
        model = _rebuild(saved["recipe"], saved["state"])
        model.load_state_dict(saved["state"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, GeometryError) as error:
        raise RunError(f"{path}: does not fit together ({_first_line(error)})") from error
    return model.eval()


def load_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``results.json`` of a run or a demo.

    Raises
    ------
    RunError
        If there is none, or it is damaged, changed by hand, or something else.
    """
    path = Path(check_path("folder", folder)) / "results.json"
    try:
        data = path.read_bytes()
        sealed = check_seal(data)
        found = json.loads(data)
    except SealError as error:
        raise RunError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read ({error})") from error
    kind = found.get("format") if isinstance(found, dict) else None
    if kind not in (FORMAT, DEMO_FORMAT, *_UNSEALED):
        raise RunError(f"{path}: is no results.json that `lrmanifold` wrote")
    if not sealed and kind not in _UNSEALED:
        raise RunError(f"{path}: is damaged: its seal is missing")
    found.pop("seal", None)
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# A dense network is this much larger than its low-rank weights of rank 1, at the most.
_LARGEST_SHARE = 512


def _rebuild(recipe: dict[str, Any], state: dict[str, Any]) -> Normalized:
    data: Any = SimpleNamespace(**recipe["data"])
    stored = sum(value.numel() for value in state.values())
    with torch.device("meta"):  # sizes from a file: counted before there is memory for them
        needed = sum(p.numel() for p in models.build(recipe["architecture"], data).parameters())
    if needed > _LARGEST_SHARE * stored:
        raise ValueError(f"{stored} stored numbers for a network of {needed}")
    network: torch.nn.Module = models.build(recipe["architecture"], data)
    kind, ranks = recipe["kind"], recipe["ranks"]
    if kind == "orthogonal":
        orthogonalize(network)
    elif kind in ("factors", "finetuned") and ranks:
        two_factors(network, ranks, keep_larger=True)
    elif ranks:
        bound = {"tau": recipe["tau"]} if kind == "condlr" else PROBED
        factorize(network, rank=ranks, **bound, init="random", keep_larger=True)
    return Normalized(network, data)
