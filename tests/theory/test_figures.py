"""Every claim that has a picture can draw it."""

from __future__ import annotations

import pytest
import torch

from theory.catalogue import claims

DRAWN = [claim for claim in claims() if claim.figure is not None]


@pytest.mark.slow
@pytest.mark.parametrize("claim", DRAWN, ids=lambda claim: claim.id)
def test_a_picture_is_drawn(claim, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = claim.figure(torch.float64, torch.device("cpu"))
    figure.savefig(tmp_path / "picture.png")
    assert figure.axes
    assert all(ax.has_data() for ax in figure.axes)
