"""Where results go: one JSON file a benchmark, with machine, versions and date, written whole."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent / "results"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "unknown"
    )


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(
            command, cwd=FOLDER.parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def conditions() -> dict[str, Any]:
    """Machine, versions, date and commit of a run."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "geoopt", "numpy")},
    }


def record(name: str, payload: Any) -> Path:
    """Write ``results/NAME.json`` = {"conditions", "results"} in one piece and return its path."""
    FOLDER.mkdir(exist_ok=True)
    target = FOLDER / f"{name}.json"
    handle, temporary = tempfile.mkstemp(dir=FOLDER, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump({"conditions": conditions(), "results": payload}, file, indent=1)
        file.write("\n")
    os.replace(temporary, target)
    return target
