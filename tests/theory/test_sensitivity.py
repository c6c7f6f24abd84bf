"""Claims notice a call of the library that is 5 % off; which need not, and why."""

from __future__ import annotations

from collections import Counter

import broken_calls
import pytest
import torch

from lrmanifold import linalg
from theory import catalogue
from theory.core import Claim, Source
from theory.runner import Settings, verify

#: Of flows and trainings, whose samples take seconds, every call returns NaN in test_nan.py.
GROUPS = ("geometry/", "conditioning/", "networks/", "certification/")
OTHERS = ("integrators/retractions", "training/transport", "training/projected-step")
SKIPPED = ("conditioning/stability", "conditioning/stability-linear", "conditioning/enclosed")
#: Retractions take turns, seed by seed.
SAMPLES = {
    "geometry/retraction-order": 8,
    "geometry/second-fundamental-form": 8,
    "certification/certificates": 1,
}

_CLIP = "_conditioning.clip_values"
TOLERANCE = "enters the rounding tolerance only"
ANY = "may be any point of the set, or any tangent vector, and a multiple is another one"
ELSEWHERE = "in the upper bound of L3.3, which is attained in the claims of that, not here"
#: (function, caller) and why it may be 5 % off, once for each such line.
INDIFFERENT: dict[str, list[tuple[str, str, str]]] = {
    "geometry/retraction-error": [
        ("FixedRank.cond", "geometry.retraction_error.check", TOLERANCE),
    ],
    "geometry/second-fundamental-form": [
        ("FixedRank.to_dense", "geometry.second_fundamental_form.check",
         "W is tangent at W, and the normal part of the second difference is looked at"),
        ("FixedRank.svdvals", "geometry.second_fundamental_form.check", TOLERANCE),
    ],
    "geometry/principal-curvatures": [
        ("FixedRank.proju", "geometry.principal_curvatures.tangent_basis",
         "eigenvectors of a projector are those of its multiples"),
    ],
    "geometry/projection-derivative": [
        ("FixedRank.proju", "geometry.principal_curvatures.tangent_basis",
         "eigenvectors of a projector are those of its multiples"),
        ("FixedRank.svdvals", "geometry.projection_derivative.check", TOLERANCE),
    ],
    "conditioning/exact-projection": [
        ("_conditioning.spectral_clip", "conditioning.exact_projection.check", ANY),
    ],
    "conditioning/k-tau-projection": [
        (_CLIP, "conditioning.k_tau_projection.check", ANY),
        (_CLIP, "conditioning.k_tau_projection.check", ANY),
    ],
    "integrators/retractions": [
        ("FixedRank.project_ambient", "integrators.retractions.check", ANY),
        ("FixedRank.to_dense", "integrators.retractions.check", TOLERANCE),
        ("FixedRank.unpack", "integrators.retractions.check", TOLERANCE),
    ],
    "training/transport": [
        ("FixedRank.svdvals", "training.transport.<genexpr>", ELSEWHERE),
        ("FixedRank.to_dense", "training.transport.check", ELSEWHERE),
    ],
    "certification/certificates": [
        ("margins.radius", "certification.certificates._labelled", "0, for a wrong label"),
    ],
}  # fmt: skip

CLAIMS = [
    c
    for c in catalogue.claims()
    if (c.id.startswith(GROUPS) or c.id in OTHERS) and c.id not in SKIPPED
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_call_of_the_library_that_is_five_percent_off_is_noticed(claim):
    settings = Settings(trials=SAMPLES.get(claim.id, 4))
    lost = broken_calls.insensitive(claim, settings, (1.05, 0.95))
    allowed = [(function, caller) for function, caller, _ in INDIFFERENT.get(claim.id, [])]
    assert Counter((site.function, site.caller) for site in lost) == Counter(allowed)


@pytest.mark.parametrize("claim_id", ["conditioning/cone-projection", "training/projected-step"])
def test_a_projection_that_clips_nothing_is_noticed(monkeypatch, claim_id):
    monkeypatch.setattr(linalg, "clip_values", lambda s, tau, **_: s)
    assert not verify(catalogue.find(claim_id), Settings(trials=8)).passed


CHECKS = """
from lrmanifold import linalg
from theory.core import inequality

def weak(sample):
    return inequality(linalg.condition_number(sample["S"]), 10.0 * sample["cond"])

def sharp(sample):
    return inequality(abs(float(linalg.condition_number(sample["S"])) - sample["cond"]), 1e-9)
"""


@pytest.mark.parametrize(("name", "sites"), [("weak", 1), ("sharp", 0)])
def test_a_bound_with_room_is_found_to_be_indifferent(name, sites):
    example = {"__name__": "theory.example"}
    exec(CHECKS, example)
    S = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    claim = Claim(
        id="group/name", title="", statement="", hypotheses=(), source=Source("ours", "here"),
        sample=lambda seed, dtype, device: {"S": S, "cond": 3.0}, check=example[name],
        controls=(),
    )  # fmt: skip
    assert len(broken_calls.insensitive(claim, Settings(trials=1), (1.05, 0.95))) == sites
