"""The ranks that factorize chooses: by number, share, pattern, compression and energy."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankLayer, Plan


@st.composite
def models(draw) -> nn.Module:
    """Linear and convolutional layers of odd sizes, with parameters that no rank can remove."""
    widths = draw(st.lists(st.integers(2, 40), min_size=2, max_size=5))
    layers: list[nn.Module] = [nn.Conv2d(3, 2 * widths[0], 3, groups=1)]
    if draw(st.booleans()):
        layers.append(nn.Conv2d(2 * widths[0], 4, (1, 3), groups=2))
    layers += [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    layers += [nn.BatchNorm2d(7), nn.Embedding(draw(st.integers(1, 30)), 5)]
    return nn.Sequential(*layers)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def matrices(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Rows, columns and groups of the matricised weight of every layer."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            g = getattr(m, "groups", 1)
            found[name] = (m.weight.shape[0] // g, math.prod(m.weight.shape[1:]), g)
    return found


def limits(model: nn.Module) -> dict[str, int]:
    return {name: min(m, n) for name, (m, n, _) in matrices(model).items()}


def removed_at(model: nn.Module, share: Fraction) -> int:
    """Parameters that a common share of min(m, n) removes; layers only ever get smaller."""
    saved = 0
    for m, n, g in matrices(model).values():
        r = max(1, math.floor(share * min(m, n)))
        saved += max(0, g * (m * n - (m + r + n) * r))
    return saved


def plan_of(model: nn.Module, **options) -> Plan:
    plans: list[Plan] = []
    lrm.factorize(model, summary=plans.append, **options)
    return plans[0]


@given(model=models(), target=st.floats(0.01, 0.95), seed=seeds)
def test_compression_hits_the_target_and_no_larger_share_does(model, target, seed):
    torch.manual_seed(seed)
    before = count(model)
    tops = set(limits(model).values())
    shares = sorted({Fraction(j, r) for r in tops for j in range(1, r + 1)} | {Fraction(0)})
    removed = {s: removed_at(model, s) for s in shares}
    if 1 - (before - removed[Fraction(0)]) / before < target:
        with pytest.raises(ValueError, match="cannot be reached"):
            lrm.factorize(model, compression=target, tau=None, include="*")
        assert count(model) == before
        return
    plan = plan_of(model, compression=target, tau=None, init="random", include="*")
    after = count(model)
    assert 1 - after / before >= target
    assert plan.compression == pytest.approx(1 - after / before, abs=1e-12)
    best = max(s for s in shares if 1 - (before - removed[s]) / before >= target)
    assert before - after == removed[best]


@given(model=models(), share=st.floats(0.01, 1.0))
def test_a_share_is_one_of_the_smaller_side(model, share):
    top = limits(model)
    plan = plan_of(model, rank=share, tau=None, keep_larger=True, init="random", include="*")
    for d in plan.decisions:
        assert d.rank == max(1, round(share * top[d.name]))
        layer = model.get_submodule(d.name)
        assert isinstance(layer, LowRankLayer)
        assert layer.rank == d.rank
        assert d.kept_weights == layer.weight.numel()


@given(model=models(), rank=st.integers(1, 50))
def test_a_rank_is_cut_to_what_the_layer_has(model, rank):
    top = limits(model)
    plan = plan_of(model, rank=rank, tau=None, keep_larger=True, init="random")
    assert {d.name: d.rank for d in plan.decisions} == {n: min(rank, r) for n, r in top.items()}


@given(model=models(), energy=st.floats(0.05, 0.999), seed=seeds)
def test_energy_keeps_the_smallest_rank_with_that_share(model, energy, seed):
    torch.manual_seed(seed)
    dense = copy.deepcopy(model)
    plan = plan_of(model, energy=energy, tau=None, keep_larger=True, include="*")
    for d in plan.decisions:
        layer = dense.get_submodule(d.name)
        g = getattr(layer, "groups", 1)
        s2 = torch.linalg.svdvals(layer.weight.detach().double().reshape(g, *d.shape)).square()
        kept = s2[:, : d.rank].sum(1) / s2.sum(1)
        assert float(kept.min()) >= energy - 1e-9
        if d.rank > 1:
            assert float((s2[:, : d.rank - 1].sum(1) / s2.sum(1)).min()) < energy + 1e-9


def test_all_the_energy_is_full_rank():
    plan = plan_of(nn.Linear(9, 7), energy=1.0, tau=None, keep_larger=True)
    assert plan.decisions[0].rank == 7


def test_the_first_pattern_counts_and_layers_without_one_stay_dense():
    model = nn.ModuleDict({k: nn.Linear(20, 20) for k in ("first", "fine", "last")})
    plan = plan_of(model, rank={"fi*t": 2, "f*": 0.25, "first": 7})
    found = {d.name: (d.rank, d.reason) for d in plan.decisions}
    assert found == {"first": (2, ""), "fine": (5, ""), "last": (None, "no rank given for it")}


def test_compression_counts_the_whole_model():
    model = nn.Sequential(nn.Linear(100, 100), nn.Embedding(100, 100))
    before = count(model)
    plan = plan_of(model, compression=0.3, tau=None)
    assert plan.compression >= 0.3
    assert count(model) <= 0.7 * before
    with pytest.raises(ValueError, match=r"compression=0.5 cannot be reached.* 48\.8% of"):
        lrm.factorize(nn.Sequential(nn.Linear(100, 100), nn.Embedding(100, 100)), compression=0.5)


def test_layers_that_are_low_rank_already_are_listed_with_their_rank():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    plans = []
    lrm.factorize(model, {"0": 8}, summary=plans.append)
    lrm.factorize(model, {"2": 4}, summary=plans.append)
    row = next(line for line in str(plans[1]).splitlines() if "low-rank already" in line)
    assert row.split()[:3] == ["0", "LowRankLinear", "8"]
    assert {o.kind: o.rank for o in plans[1].others} == {"LowRankLinear": 8, "Linear": None}


def test_a_share_of_which_no_rank_is_left_is_said():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 600), nn.Linear(600, 600))
    plans = []
    with warnings.catch_warnings():  # one layer has a rank of that size
        warnings.simplefilter("error")
        lrm.factorize(copy.deepcopy(model), rank=0.001, summary=plans.append)
    (plan,) = plans
    assert [d.note for d in plan.decisions] == ["0.001 of 64 is less than 1"] * 2 + [""]
    assert "0.001 of 64 is less than 1" in str(plan)
    with pytest.warns(UserWarning, match=r"every low-rank layer gets rank 1: rank = 0\.0001"):
        lrm.factorize(model, rank=0.0001)


def test_a_rank_written_as_a_float_is_refused_with_the_int():
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 8\.0: 8 is the rank itself"):
        lrm.factorize(nn.Linear(64, 64), rank=8.0)
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 1\.5$"):
        lrm.factorize(nn.Linear(64, 64), rank=1.5)
