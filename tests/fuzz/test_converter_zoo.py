"""Odd models through all conversions: right, or refused with nothing changed; a part by default."""

from __future__ import annotations

import converter_zoo as zoo
import odd_models
import pytest
from torch import nn

import lrmanifold as lrm


def assert_nothing_found(count: int, seed: int) -> None:
    findings = [o for o in zoo.run(count, seed) if o.kind not in ("right", "refused")]
    assert not findings, "\n".join(map(str, findings))


def test_odd_models_come_out_right_or_are_refused_whole():
    assert_nothing_found(len(odd_models.ODDITIES) * len(zoo.CONVERSIONS), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_1000_odd_models_come_out_right_or_are_refused_whole(seed):
    assert_nothing_found(1000, seed)


def broken(monkeypatch, conversion) -> str:
    """The outcome of a conversion that does something wrong."""
    monkeypatch.setitem(zoo.CONVERSIONS, "broken", conversion)
    model = nn.Sequential(odd_models.linear(), nn.Tanh(), odd_models.linear())
    odd_models.tie_bias(model[0], model[2])
    return zoo.convert(model, "broken", (), meta=False).kind


def test_the_zoo_finds_what_it_is_meant_to_find(monkeypatch):
    def change_then_refuse(model):
        model[0].requires_grad_(False)
        raise ValueError("no")

    def untie(model):
        model[2].bias = nn.Parameter(model[2].bias.detach().clone())
        return model

    def crash(model):
        return model.nothing

    assert broken(monkeypatch, change_then_refuse) == "damaged"
    assert broken(monkeypatch, untie) == "untied"
    assert broken(monkeypatch, crash) == "internal"
    assert broken(monkeypatch, lambda m: lrm.factorize(m, rank=1, tau=None)) == "different"
    assert broken(monkeypatch, zoo.factorize) == "right"
    assert len({case[2] for case in zoo.cases(200, 0)}) > 150
