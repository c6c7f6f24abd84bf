"""No claim passes on NaN: library functions broken one call at a time, and samples that are NaN."""

from __future__ import annotations

import ast
import math
import warnings
from pathlib import Path

import broken_calls
import pytest
import torch

import theory
from theory import catalogue
from theory.core import (
    Claim,
    Control,
    Evidence,
    Source,
    identity,
    inequality,
    largest,
    smallest,
    violated,
    worst_of,
)
from theory.runner import Settings, verify
from theory.sampling import Draw
from theory.search import search

NAN = math.nan

#: Retractions take turns, seed by seed: samples that see them all.
SAMPLES = {
    "geometry/retraction-order": 8,
    "geometry/second-fundamental-form": 8,
    "training/transport": 8,
}
#: How many calls are broken at least: decorated methods, a table of functions, an optimizer.
CALLS = {
    "geometry/stiefel-order": 2,
    "geometry/retraction-order": 13,
    "conditioning/exact-projection": 2,
    "training/transport": 9,
}
SLOW = {
    "approximation/any-neighbour",
    "approximation/koch-lubich",
    "approximation/lipschitz-loss",
    "approximation/prescribed-path",
    "approximation/strongly-convex",
    "integrators/order",
    "integrators/small-singular-values",
    "training/catching-up",
    "training/discrete-a-priori",
    "training/noise",
    "approximation/certificate",
    "approximation/constrained",
    "approximation/constrained-defect",
    "approximation/constrained-linear",
    "approximation/isometries",
    "approximation/no-blow-up",
    "approximation/proportional",
}
#: What is measured along every path, and in these claims enters pictures and details only.
CURVATURE = ("_svd.svdvals", "approximation.flows.spectral_norm")
SMALLEST = ("_svd.svdvals", "approximation.flows.measure")
NO_PART_OF_THE_VERDICT = {
    "approximation/a-priori": {CURVATURE},
    "approximation/lipschitz-loss": {CURVATURE},
    "approximation/prescribed-path": {CURVATURE},
    "approximation/strongly-convex": {CURVATURE},
    "approximation/any-neighbour": {CURVATURE},
    "approximation/unknown-gap": {CURVATURE},
    "approximation/exponent": {CURVATURE},
    "approximation/no-blow-up": {CURVATURE},
    "approximation/proportional": {CURVATURE, SMALLEST},
    "approximation/koch-lubich": {CURVATURE, SMALLEST},
    "training/discrete-a-priori": {CURVATURE},
}


def marked(c: Claim):
    return pytest.param(c, id=c.id, marks=[pytest.mark.slow] if c.id in SLOW else [])


@pytest.mark.parametrize("claim", list(map(marked, catalogue.claims())))
def test_every_call_of_the_library_that_returns_nan_is_noticed(claim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimizer says that it leaves out steps with NaN
        lost, tried = broken_calls.unnoticed(claim, Settings(trials=SAMPLES.get(claim.id, 1)))
    allowed = NO_PART_OF_THE_VERDICT.get(claim.id, set())
    assert tried >= CALLS.get(claim.id, 0)
    assert [site for site in lost if (site.function, site.caller) not in allowed] == []


SMALL = ("geometry", "conditioning", "networks", "certification")


@pytest.mark.parametrize(
    "claim", [c for group in SMALL for c in catalogue.load(group)], ids=lambda c: c.id
)
def test_no_claim_holds_on_a_sample_of_nan(claim):
    sample = claim.sample(0, torch.float64, torch.device("cpu"))
    if claim.id == "conditioning/enclosed":
        pytest.skip("its samples are numbers of boxes")
    assert not broken_calls.judged(claim, broken_calls.poisoned(sample)).holds


CHECKS = """
from lrmanifold import linalg
from theory.core import inequality, largest, not_met

def lost(sample):
    R = float(linalg.conditioning_penalty(sample["S"]))
    return inequality(max(0.0, R - R), 1.0)

def kept(sample):
    R = linalg.conditioning_penalty(sample["S"])
    return inequality(largest((0.0, R - R)), 1.0)

def skipped(sample):
    R = float(linalg.conditioning_penalty(sample["S"]))
    return inequality(0.0, 1.0) if R > 0.0 else not_met("R = 0")
"""


@pytest.mark.parametrize(("name", "sites"), [("lost", 1), ("kept", 0), ("skipped", 1)])
def test_a_check_that_loses_nan_is_found(name, sites):
    """The fault that this guard is for: Python's `max` keeps its first argument against NaN."""
    example = {"__name__": "theory.example"}
    exec(CHECKS, example)
    found, tried = broken_calls.unnoticed(claim(example[name]), Settings(trials=1))
    assert (len(found), tried) == (sites, 1)


# -- the verdict


def draw(seed, dtype, device):
    given = Draw(seed, dtype, device)
    return {"S": given.give(given.normal(3, 3)), "u": given.uniform()}


def claim(check) -> Claim:
    return Claim(
        id="group/name",
        title="",
        statement="",
        hypotheses=(),
        source=Source("ours", "here"),
        sample=draw,
        check=check,
        controls=(Control("", check),),
        trials=5,
    )


@pytest.mark.parametrize("place", range(3))
def test_the_largest_of_numbers_with_nan_is_nan(place):
    values = [1.0, 2.0, 3.0]
    assert (largest(values), smallest(values)) == (3.0, 1.0)
    values[place] = NAN
    assert math.isnan(largest(values))
    assert math.isnan(smallest(values))
    assert worst_of(dict(enumerate(values)))[0] == place
    found = violated(dict(enumerate(values)), 10.0)
    assert found is not None
    assert not found.holds
    assert found.detail["what"] == place
    assert violated({"a": 1.0, "b": 2.0}, 2.0) is None


@pytest.mark.parametrize(
    "found",
    [
        Evidence(NAN, 1.0, True),
        Evidence(0.0, NAN, True),
        Evidence(0.0, 1.0, True, ratios=(0.0, NAN)),
        identity(NAN, tolerance=1.0),
    ],
)
def test_evidence_with_nan_never_holds_whatever_the_check_says(found):
    assert not found.holds
    verdict = verify(claim(lambda sample: found), Settings())
    assert not verdict.passed
    assert verdict.violations == 5


@pytest.mark.parametrize("first", [True, False])
def test_a_sample_of_nan_is_the_worst_one(first):
    def check(sample):
        return inequality(NAN if (sample["u"] > 0.5) == first else 2.0, 1.0)

    verdict = verify(claim(check), Settings(trials=20))
    assert math.isnan(verdict.worst["measured"])
    assert math.isnan(verdict.ratio[2])


def test_an_infinite_side_is_not_covered_by_an_infinite_bound():
    """Inf <= Inf is true, and says nothing: an overflow of both sides held with the ratio NaN."""
    assert not inequality(math.inf, math.inf).holds
    assert inequality(1.0, math.inf).holds
    assert not inequality(math.inf, 1.0).holds
    verdict = verify(claim(lambda sample: inequality(math.inf, math.inf)), Settings(trials=4))
    assert not verdict.passed
    assert verdict.violations == 4


def test_search_takes_nan_for_a_violation():
    """NaN on a thousandth of the samples, where the ratio is largest."""

    def check(sample):
        return inequality(NAN if sample["u"] > 0.999 else sample["u"], 1.0)

    known = claim(check)
    assert verify(known, Settings()).passed
    found = search(known, Settings(search=400))
    assert not found.holds
    assert not verify(known, Settings(search=400)).passed


def test_checks_use_no_maximum_that_drops_nan():
    """`max` and `min` of Python are for sizes, in functions that draw or draw pictures."""
    numbers = {"core.py", "runner.py", "search.py", "report.py", "plotting.py"}
    for path in Path(theory.__file__).parent.rglob("*.py"):
        if path.name in numbers:
            continue
        for function in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef) and function.name.startswith("check"):
                called = [n.func.id for n in ast.walk(function) if isinstance(n, ast.Call)
                          and isinstance(n.func, ast.Name) and n.func.id in ("max", "min")
                          and not _is_of_sizes(n)]  # fmt: skip
                assert not called, f"{path}, {function.name}: largest and smallest of theory.core"


def _is_of_sizes(call: ast.Call) -> bool:
    """min(m, n), min(2, x.shape[-1]), max(2, round(x)), min(len(p) for p in points)."""
    names = {n.id for n in ast.walk(call) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(call) if isinstance(n, ast.Attribute)}
    return names <= {"min", "m", "n"} or bool(names & {"len", "round", "shape"})
