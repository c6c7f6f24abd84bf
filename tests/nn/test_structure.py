"""structure and restructure: the same low-rank layers in another dense model, without a plan."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lrmanifold as lrm
from lrmanifold.nn import LowRankAdapter, LowRankLinear, restructure, structure


class Net(nn.Module):
    """A layer of each kind, a tied head, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True, dropout=0.0)
        self.conv, self.up = nn.Conv1d(16, 16, 3, groups=2), nn.ConvTranspose1d(16, 16, 3)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.encoder(self.embed(ids)).mT
        return self.head(self.up(self.conv(x).relu()).mT)


def factorized(**how) -> nn.Module:
    return lrm.factorize(Net(), 3, include=["*", "embed"], exclude="*.k_proj", **how)


@pytest.mark.parametrize("how", [{}, {"tau": None}, {"tau": 0.0, "scale": 2.0}])
def test_a_state_dict_loads_into_the_rebuilt_model(how):
    net = factorized(**how)
    ids = torch.randint(40, (2, 7))
    text = json.dumps(structure(net), allow_nan=False)
    again = restructure(Net(), json.loads(text))
    assert structure(again) == structure(net)
    assert [type(m) for m in again.modules()] == [type(m) for m in net.modules()]
    assert again.head.weight is again.embed.weight
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval()(ids), net.eval()(ids))
    for a, b in zip(again.modules(), net.modules(), strict=True):
        if isinstance(a, lrm.nn.LowRankLayer):
            assert repr(a.manifold) == repr(b.manifold)


def test_a_single_layer_and_a_dense_model():
    layer = LowRankLinear(9, 8, 2, tau=0.3)
    again = restructure(nn.Linear(9, 8), structure(layer))
    assert isinstance(again, LowRankLinear)
    assert (again.rank, again.tau) == (2, 0.3)
    dense = nn.Sequential(nn.Linear(3, 3))
    assert restructure(dense, structure(dense)) is dense
    assert type(dense[0]) is nn.Linear


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    found = structure(factorized())
    other = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ValueError, match="'embed' is not there"):
        restructure(other, found)
    assert type(other[0]) is nn.Linear
    worse = copy.deepcopy(found)
    worse["layers"]["up"]["rank"] = 99
    net = Net()
    with pytest.raises(ValueError, match="layer 'up' cannot be made: rank must be"):
        restructure(net, worse)
    assert type(net.embed) is nn.Embedding
    for bad in ({}, {"version": 2, "layers": {}}, {"version": 1}):
        with pytest.raises(ValueError, match="must be what structure"):
            restructure(Net(), bad)
    with pytest.raises(TypeError, match="found must be"):
        restructure(Net(), [])
    with pytest.raises(ValueError, match="no adapter, got one at '0'"):
        structure(nn.Sequential(LowRankAdapter(nn.Linear(4, 4), 2)))
