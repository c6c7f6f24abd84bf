"""What all tests share: devices, one thread, hypothesis profiles, the place of the data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Matrices here are tiny: a second thread costs more than it brings, and xdist uses the cores.
torch.set_num_threads(1)

# The device fixture is the same for all examples of a test, so sharing it between them is right.
_SHARED = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("ci", derandomize=True, max_examples=25, **_SHARED)
settings.register_profile("thorough", max_examples=400, **_SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES, scope="session")
def device(request) -> torch.device:
    """Each device there is; a test that takes it is collected once for each."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Tests that draw from torch's global generator draw the same numbers in every order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the shared data: $LRMANIFOLD_DATA, or ../shared/data beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("LRMANIFOLD_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}; set LRMANIFOLD_DATA")
    return folder
